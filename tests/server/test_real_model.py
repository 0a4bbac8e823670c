"""The whole of Octavo: the embedded model behind a live server, driven by the official client."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from engine.config import EngineConfig
from engine.launch import assemble, load_model
from server.config import ServerConfig
from tests.server.conftest import Live, running

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
MODEL = "SmolLM2-135M-Instruct"
STORY = "Once upon a time"
PROMPT = "The first ten even numbers are 2, 4, 6,"


@pytest.fixture(scope="module")
def real() -> Iterator[Live]:
    """A server around the embedded model, with a KV cache small enough to be contended.

    In float32: with bfloat16's rounding the batch a token is computed in may decide between two near equals.
    """
    config = EngineConfig(kv_cache_memory=128 << 20, dtype="float32")
    with running(assemble(config, load_model(config)), ServerConfig(port=0)) as live:
        live.engine.observer = live.metrics
        yield live


@pytest.fixture(autouse=True)
def idle_afterwards(real: Live) -> Iterator[None]:
    """Whatever a test did, in the end nothing runs, nothing waits and no block is held."""
    yield
    deadline = time.monotonic() + 5
    while (_state(real) != (0, 0, 0)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _state(real) == (0, 0, 0)


def _state(live: Live) -> tuple[int, int, int]:
    stats = live.engine.stats()
    return stats.num_running, stats.num_waiting, stats.used_blocks


def _complete(live: Live, **arguments: Any) -> Any:
    return live.openai.completions.create(**{"model": MODEL, "prompt": PROMPT, "temperature": 0, **arguments})


def _chat(live: Live, **arguments: Any) -> Any:
    return live.openai.chat.completions.create(
        **{"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24, **arguments}
    )


def test_the_model_answers_sensibly(real: Live) -> None:
    assert "Paris" in _chat(real).choices[0].message.content
    assert " 8, 10, 12" in _complete(real).choices[0].text


def test_completions_stream_what_they_answer_whole(real: Live) -> None:
    whole = _complete(real, max_tokens=30)
    chunks = list(_complete(real, max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 30


def test_chats_stream_what_they_answer_whole(real: Live) -> None:
    whole, chunks = _chat(real), list(_chat(real, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert (chunks[0].choices[0].delta.role, chunks[-1].choices[0].finish_reason) == ("assistant", "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_three_choices_of_one_prompt_are_three_answers(real: Live, stream: bool) -> None:
    arguments = {"prompt": STORY, "n": 3, "temperature": 1.2, "seed": 5, "max_tokens": 20}
    answer = _complete(real, stream=stream, **arguments)
    texts = ["", "", ""]
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in _complete(real, **arguments).choices], "a seed repeats itself"


def test_another_seed_gives_another_answer(real: Live) -> None:
    answers = {_complete(real, prompt=STORY, temperature=1.0, seed=seed).choices[0].text for seed in range(4)}
    assert len(answers) > 1


def test_the_best_of_several_are_the_likeliest_of_them(real: Live) -> None:
    arguments = {"prompt": STORY, "temperature": 1.2, "seed": 5, "max_tokens": 12}
    every = _complete(real, n=6, logprobs=0, **arguments)
    means = [sum(values) / len(values) for values in (choice.logprobs.token_logprobs for choice in every.choices)]
    likeliest = sorted(range(6), key=lambda index: -means[index])
    best = _complete(real, n=2, best_of=6, **arguments)
    assert [choice.text for choice in best.choices] == [every.choices[index].text for index in likeliest[:2]]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == every.usage.completion_tokens


def test_a_beam_search_finds_likelier_text_than_the_greedy_way(real: Live) -> None:
    arguments = {"prompt": STORY, "max_tokens": 12, "logprobs": 1}
    greedy = _complete(real, **arguments).choices[0]
    answer = _complete(real, n=2, best_of=4, extra_body={"use_beam_search": True}, **arguments)
    means = [sum(one.logprobs.token_logprobs) / len(one.logprobs.tokens) for one in (*answer.choices, greedy)]
    assert means == sorted(means, reverse=True)
    assert answer.choices[0].text != greedy.text
    assert answer.usage.completion_tokens == 48


def test_a_stop_string_ends_the_text_before_it(real: Live) -> None:
    answer = _complete(real, stop=[" 14", "\n"], max_tokens=40)
    assert answer.choices[0].text == " 8, 10, 12,"
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_are_negative_and_name_the_best_first(real: Live) -> None:
    content = _chat(real, logprobs=True, top_logprobs=3, max_tokens=5).choices[0].logprobs.content
    assert len(content) == 5
    for token in content:
        assert token.logprob <= 0
        assert token.token == token.top_logprobs[0].token, "greedy"
        assert len(token.top_logprobs) == 3


def test_a_second_turn_finds_the_first_in_the_cache(real: Live) -> None:
    question = {"role": "user", "content": "Name the planets."}
    first = _chat(real, messages=[question], max_tokens=60)
    answered = {"role": "assistant", "content": first.choices[0].message.content}
    turns = [question, answered, {"role": "user", "content": "Which is the largest?"}]
    *_, last = _chat(real, messages=turns, stream=True, stream_options={"include_usage": True})
    computed = first.usage.total_tokens - 1  # the last token was never fed back
    assert last.usage.prompt_tokens_details.cached_tokens == computed // 16 * 16 > first.usage.prompt_tokens
    again = _chat(real, messages=turns)
    assert again.usage.prompt_tokens_details.cached_tokens == (again.usage.prompt_tokens - 1) // 16 * 16


def test_answers_are_the_same_alone_and_among_64_streams_of_which_20_are_cut_off(real: Live) -> None:
    prompts = [f"{number} plus {number + 1} is" for number in range(64)]
    alone = [_complete(real, prompt=prompt, max_tokens=4).choices[0].text for prompt in prompts[::8]]

    async def stream(client: openai.AsyncOpenAI, number: int) -> str:
        text, cut = "", number % 8 in (1, 5, 6) and number < 54
        answer = await client.completions.create(
            model=MODEL,
            prompt=prompts[number],
            temperature=0,
            max_tokens=4 if number % 8 == 0 else 40,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for chunk in answer:
            text += chunk.choices[0].text
            if cut and len(text) > 20:
                await answer.close()
                return "cut"
        return text

    async def everyone() -> list[str]:
        async with (
            openai.DefaultAsyncHttpxClient(timeout=60, trust_env=False) as transport,
            openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key="none", http_client=transport) as client,
        ):
            return await asyncio.gather(*(stream(client, number) for number in range(64)))

    texts = asyncio.run(everyone())
    assert texts.count("cut") == 20
    assert texts[::8] == alone
    assert all(len(text) > 20 for number, text in enumerate(texts) if number % 8 and text != "cut")


def test_an_answer_has_the_form_of_its_schema(real: Live) -> None:
    schema = {
        "type": "object",
        "properties": {
            "capital": {"type": "string", "maxLength": 20},
            "continent": {"enum": ["Africa", "Asia", "Europe"]},
            "neighbours": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 1, "maxItems": 3},
        },
        "required": ["capital", "continent", "neighbours"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "country", "schema": schema, "strict": True}}
    answer = _chat(real, response_format=form, max_tokens=100, n=2, temperature=0.7, seed=1)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), schema)


def test_what_a_pattern_leaves_open_the_model_fills_with_what_it_knows(real: Live) -> None:
    (choice,) = _chat(real, extra_body={"guided_regex": "The capital is [A-Z][a-z]+[.]"}).choices
    assert choice.message.content == "The capital is Paris."


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_is_called_with_arguments_that_fit(real: Live, choice: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Paris", "Berlin"]}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city"],
    }
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = _chat(
        real, messages=question, tools=[tool], tool_choice=choice, parallel_tool_calls=False, max_tokens=150
    ).choices[0]
    (call,) = answer.message.tool_calls
    assert (answer.finish_reason, answer.message.content, call.function.name) == ("tool_calls", None, "weather")
    assert json.loads(call.function.arguments)["city"] == "Paris"
    jsonschema.validate(json.loads(call.function.arguments), schema)


def test_a_response_is_what_the_chat_says_and_its_stream_the_same(real: Live) -> None:
    (choice,) = _chat(real).choices
    given: dict[str, Any] = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 24}
    assert real.openai.responses.create(**given).output_text == choice.message.content
    with real.openai.responses.stream(**given) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == choice.message.content == "".join(deltas)


def test_texts_that_mean_alike_have_embeddings_closer_than_others_and_the_same_alone(real: Live) -> None:
    texts = [
        "A cat sleeps on the sofa.",
        "A kitten is napping on the couch.",
        "The bank raised interest rates.",
    ]
    together = [one.embedding for one in real.openai.embeddings.create(model=MODEL, input=texts).data]
    cat, kitten, bank = map(np.array, together)
    assert [float(np.linalg.norm(one)) for one in (cat, kitten, bank)] == pytest.approx([1] * 3, abs=1e-5)
    assert cat @ kitten > max(cat @ bank, kitten @ bank)
    alone = real.openai.embeddings.create(model=MODEL, input=texts[1], encoding_format="float").data[0].embedding
    np.testing.assert_allclose(alone, kitten, atol=1e-5)
    assert len(alone) == 576


def test_the_metrics_page_tells_what_happened(real: Live) -> None:
    page = real.http.get("/metrics").text
    counts = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line[0] != "#"}
    model = '{model_name="SmolLM2-135M-Instruct"}'
    assert counts[f"octavo:num_requests_running{model}"] == 0
    assert counts[f"octavo:generation_tokens_total{model}"] > 0
    assert counts[f"octavo:time_to_first_token_seconds_count{model}"] > 0
    assert counts[f"octavo:request_time_per_output_token_seconds_count{model}"] > 0


def test_a_text_is_scored_as_it_was_generated(real: Live) -> None:
    """The tokens of an answer are as likely in a prompt as when they came out; lm-eval ranks texts by that."""
    written = _complete(real, max_tokens=8, logprobs=3)
    scored = _complete(real, prompt=PROMPT + written.choices[0].text, max_tokens=0, echo=True, logprobs=3)
    logprobs, tail = scored.choices[0].logprobs, written.choices[0].logprobs
    assert scored.usage.completion_tokens == 0
    assert scored.choices[0].text == PROMPT + written.choices[0].text
    assert logprobs.token_logprobs[0] is None
    assert logprobs.tokens[-8:] == tail.tokens
    assert logprobs.token_logprobs[-8:] == pytest.approx(tail.token_logprobs, abs=1e-3)
    assert "".join(logprobs.tokens) == scored.choices[0].text
    assert [len(logprobs.tokens)] * 3 == [
        len(one) for one in (logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset)
    ]
