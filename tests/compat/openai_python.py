"""The `openai` package for Python against a running server: every feature of it that the server has.

The client finds the server by its own variables, OPENAI_BASE_URL and OPENAI_API_KEY.
"""

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

MODEL = "SmolLM2-135M-Instruct"
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
FORCED: Any = {"type": "function", "function": {"name": "weather"}}


class Country(BaseModel):
    """What is asked for."""

    continent: Literal["Africa", "Asia", "Europe"]
    landlocked: bool


class weather(BaseModel):  # noqa: N801 — its name is the tool's
    """The weather of a city."""

    city: Literal["Rome", "Paris"]


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    with openai.OpenAI(max_retries=0, timeout=60) as client:
        yield client


def ask(client: openai.OpenAI, **arguments: Any) -> Any:
    given = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 16, **arguments}
    return client.chat.completions.create(**given)


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_a_chat_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask(client).choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_the_helper_for_streams_accumulates(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0, max_tokens=16) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert final.choices[0].message.content == ask(client).choices[0].message.content


def test_a_stream_can_be_closed_early(client: openai.OpenAI) -> None:
    stream = ask(client, stream=True, max_completion_tokens=200, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert "Paris" in ask(client).choices[0].message.content


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_and_parts_are_taken(client: openai.OpenAI, role: Any) -> None:
    parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": "of France?"}]
    messages: Any = [{"role": role, "content": "Be brief."}, {"role": "user", "content": parts, "name": "Ann"}]
    assert ask(client, messages=messages).choices[0].message.content


def test_fields_that_ask_for_nothing_here_do_no_harm(client: openai.OpenAI) -> None:
    answer = ask(
        client,
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        parallel_tool_calls=True,
        tools=[],
        user="someone",
        reasoning_effort="low",
        modalities=["text"],
        stop=None,
        logit_bias=None,
        response_format={"type": "text"},
        extra_body={"unheard_of": 1},
    )
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_several_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    texts = [[choice.message.content for choice in ask(client, n=3, temperature=1.5, seed=7).choices] for _ in range(2)]
    assert len(set(texts[0])) > 1
    assert texts[0] == texts[1]


def test_stop_strings_and_limits_give_their_reasons(client: openai.OpenAI) -> None:
    stopped = ask(client, stop=["Paris"]).choices[0]
    assert (stopped.finish_reason, "Paris" in stopped.message.content) == ("stop", False)
    assert ask(client, max_completion_tokens=1).choices[0].finish_reason == "length"


def test_a_bias_forbids_a_token(client: openai.OpenAI) -> None:
    first = ask(client, logprobs=True, max_completion_tokens=1).choices[0].logprobs.content[0].token
    url = f"{client.base_url}".replace("/v1/", "/tokenize")
    (number,) = client.post(url, body={"prompt": first}, cast_to=dict[str, Any])["tokens"]
    banned = ask(client, max_completion_tokens=1, logprobs=True, logit_bias={str(number): -100})
    assert banned.choices[0].logprobs.content[0].token != first


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    content = ask(client, logprobs=True, top_logprobs=4).choices[0].logprobs.content
    for token in content:
        assert bytes(token.bytes).decode(errors="replace")
        assert token.logprob == max(other.logprob for other in token.top_logprobs) <= 0
        assert len(token.top_logprobs) == 4


def test_completions_take_every_kind_of_prompt(client: openai.OpenAI) -> None:
    for prompt, count in (("One two", 1), (["One", "Two"], 2), ([10, 11], 1), ([[10, 11], [12]], 2)):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=3, n=2)
        assert [choice.index for choice in answer.choices] == list(range(2 * count))


def test_completions_score_a_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The sky is blue", max_tokens=1, echo=True, logprobs=2, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith("The sky is blue")
    assert logprobs.token_logprobs[0] is None
    assert all(math.isfinite(one) for one in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == answer.usage.total_tokens


def test_completions_choose_the_best_and_penalize(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="Once", best_of=3, n=2, max_tokens=5, seed=1, frequency_penalty=1, presence_penalty=1
    )
    assert len(answer.choices) == 2
    assert answer.usage.completion_tokens == 15


def test_completions_stream(client: openai.OpenAI) -> None:
    arguments: Any = {"model": MODEL, "prompt": "Two, four, six,", "max_tokens": 8, "temperature": 0}
    chunks = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == client.completions.create(**arguments).choices[0].text
    assert chunks[-1].usage.completion_tokens == 8


def test_a_class_of_pydantic_is_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=Country, max_tokens=60, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Country)


def test_an_answer_cut_short_is_told_by_the_parser(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Country, max_tokens=1)


def test_a_class_of_pydantic_is_parsed_from_a_stream(client: openai.OpenAI) -> None:
    arguments: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 60, "temperature": 0}
    with client.chat.completions.stream(**arguments, response_format=Country) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Country)


def test_any_json_object(client: openai.OpenAI) -> None:
    answer = ask(client, response_format={"type": "json_object"}, max_completion_tokens=60, temperature=0)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_a_tool_is_called_and_its_result_is_read(client: openai.OpenAI) -> None:
    called = ask(client, tools=[WEATHER], tool_choice=FORCED, max_completion_tokens=60).choices[0]
    (call,) = called.message.tool_calls
    assert (called.finish_reason, call.type, call.function.name) == ("tool_calls", "function", "weather")
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Paris")
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    said = ask(client, messages=[*QUESTION, called.message, result], tools=[WEATHER])
    assert said.choices[0].message.role == "assistant"


def test_a_tool_call_streams(client: openai.OpenAI) -> None:
    stream = ask(client, tools=[WEATHER], tool_choice="required", max_completion_tokens=200, stream=True)
    ids, arguments, reasons = {}, dict[int, str](), []
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or ():
            ids[call.index] = call.id or ids[call.index]
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
        reasons.append(chunk.choices[0].finish_reason)
    assert sorted(ids) == list(range(len(ids)))
    assert len(set(ids.values())) == len(ids)
    assert reasons[-1] in ("tool_calls", "length")
    if reasons[-1] == "tool_calls":
        assert all(json.loads(one)["city"] in ("Rome", "Paris") for one in arguments.values())


def test_a_tool_of_pydantic_is_parsed(client: openai.OpenAI) -> None:
    arguments: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 60, "temperature": 0}
    tool = openai.pydantic_function_tool(weather)
    answer = client.chat.completions.parse(**arguments, tools=[tool], tool_choice=FORCED)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, weather)
    with client.chat.completions.stream(**arguments, tools=[tool], tool_choice=FORCED) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, weather)
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 3}, openai.BadRequestError, None),
        ({"messages": []}, openai.BadRequestError, None),
        ({"max_completion_tokens": 10**6}, openai.BadRequestError, "context_length_exceeded"),
        ({"stream": True, "n": 0}, openai.BadRequestError, None),
    ],
)
def test_errors_have_their_classes(client: openai.OpenAI, arguments: Any, kind: Any, code: str | None) -> None:
    with pytest.raises(kind) as raised:
        ask(client, **arguments)
    assert raised.value.code == code
    assert raised.value.message
    assert raised.value.type == "invalid_request_error"
    assert raised.value.request_id


def test_a_wrong_key_is_an_authentication_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as raised:
        ask(client.with_options(api_key="wrong"))
    assert raised.value.code == "invalid_api_key"


def test_a_timeout_of_the_client_and_one_of_the_server(client: openai.OpenAI) -> None:
    long: Any = {"max_completion_tokens": 1000, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.05), **long)
    with pytest.raises(openai.APIStatusError) as raised:
        ask(client.with_options(max_retries=2), **{**long, "extra_body": {"ignore_eos": True, "timeout": 0.2}})
    assert raised.value.status_code == 408


def test_raw_and_streaming_responses_show_headers(client: openai.OpenAI) -> None:
    arguments: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 2}
    raw = client.chat.completions.with_raw_response.create(**arguments, extra_headers={"X-Request-Id": "mine"})
    assert raw.headers["x-request-id"] == "mine"
    assert raw.parse()._request_id == "mine"
    with client.chat.completions.with_streaming_response.create(**arguments, stream=True) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"


def test_the_asynchronous_client_runs_many_at_once() -> None:
    async def everyone() -> list[str | None]:
        async with openai.AsyncOpenAI(max_retries=0) as client:
            asking = [
                client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=8)
                for _ in range(8)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asking)]

    answers = asyncio.run(everyone())
    assert len(answers) == 8
    assert all("Paris" in (answer or "") for answer in answers)
