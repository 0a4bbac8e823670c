"""POST /v1/responses given whole, as the official client sees it."""

import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from engine.memory import MemoryPlan
from server.config import ServerConfig
from tests.server.conftest import Live, wait_until
from tests.server.fakes import FakeEngine, byte_tokenizer
from tests.server.obedient import obedient
from tests.server.refusals import check_error
from tests.server.scripted import Stage, staged
from tests.server.test_disconnects import connect
from tests.server.test_tools import CALL, NATIVE, SCHEMA

PATH = "/v1/responses"
WEATHER = {"type": "function", "name": "weather", "description": "The weather.", "parameters": SCHEMA}
CLOCK = {"type": "function", "name": "clock"}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """A real engine around a model that says as little as its grammar lets it."""
    plan = MemoryPlan(num_blocks=512, num_host_blocks=0, max_model_len=4096)
    with staged(ServerConfig(port=0), script=obedient, max_num_seqs=4, plan=plan) as stage:
        yield stage


def ask(live: Live, **fields: Any) -> dict[str, Any]:
    answer = live.http.post(PATH, json={"input": "Hi", **fields})
    assert answer.status_code == 200, answer.text
    Response.model_validate_json(answer.text, strict=True)
    return dict(answer.json())


def prompt_of(live: Live) -> str:
    """What the model saw last."""
    return live.engine.tokenizer.decode(live.engine.submitted[-1].prompt, skip_special_tokens=False)


def test_a_text_is_answered(live: Live) -> None:
    answer = live.openai.responses.create(
        model="fake", input="Hi", instructions="Be kind.", metadata={"a": "b"}, store=True, user="me", temperature=0.5
    )
    assert prompt_of(live) == "<s><|system|>Be kind.\n<|user|>Hi\n<|assistant|>"
    assert (answer.object, answer.model, answer.status) == ("response", "fake", "completed")
    assert answer.id.startswith("resp_")
    assert answer.output_text.startswith("The café's 😀 answer")
    (message,) = answer.output
    assert message.type == "message"
    assert (message.role, message.status, len(message.content)) == ("assistant", "completed", 1)
    assert (answer.instructions, answer.metadata, answer.temperature) == ("Be kind.", {"a": "b"}, 0.5)
    assert (answer.error, answer.incomplete_details, answer.previous_response_id) == (None, None, None)
    assert answer.model_dump()["store"] is False


def test_usage_counts_what_went_in_and_came_out(live: Live) -> None:
    body = {"input": "x" * 40, "max_output_tokens": 5}
    usage = ask(live, **body)["usage"]
    prompt = len(live.engine.submitted[-1].prompt)
    assert usage == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": prompt // 16 * 16, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + 5,
    }
    assert ask(live, kv_policy="streaming")["usage"]["kv"]["policy"]["type"] == "streaming"


def test_an_answer_that_is_cut_off_is_incomplete(live: Live) -> None:
    answer = ask(live, max_output_tokens=3)
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["output"][0]["content"][0]["text"] == "The"
    assert answer["max_output_tokens"] == 3


@pytest.mark.parametrize("fields", [{"stop": "The"}, {"stop": "T"}])
def test_an_answer_without_words_is_an_empty_message(live: Live, fields: dict[str, Any]) -> None:
    answer = ask(live, **fields)
    assert answer["status"] == "completed"
    assert [part["text"] for item in answer["output"] for part in item["content"]] == [""]


def test_a_conversation_comes_as_items(live: Live) -> None:
    live.openai.responses.create(
        model="fake",
        instructions="Be kind.",
        input=[
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": t} for t in ("A", "B")]},
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Hello", "annotations": []}],
            },
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "user", "content": "Why?"},
        ],
    )
    assert prompt_of(live) == (
        "<s><|system|>Be kind.\n\nBe brief.\n<|user|>A\nB\n<|assistant|>Hello\n<|assistant|>No.\n"
        "<|user|>Why?\n<|assistant|>"
    )


def test_an_answers_items_can_be_sent_back_as_they_came(wide: Live) -> None:
    wide.engine.words = f"I ask. {CALL}"
    first = wide.openai.responses.create(model="fake", input="Hi", tools=[WEATHER])
    result = {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "rain"}
    history = [{"role": "user", "content": "Hi"}, *(item.model_dump() for item in first.output), result]
    wide.openai.responses.create(model="fake", input=history, tools=[WEATHER])
    assert f"<|assistant|>I ask.\n{CALL}\n<|user|><tool_response>\nrain\n</tool_response>\n" in prompt_of(wide)


def test_calls_belong_to_the_words_before_them(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(tokenizer=byte_tokenizer(NATIVE), max_model_len=4096))
    calls = [
        {"type": "function_call", "call_id": f"c{i}", "name": "weather", "arguments": f'{{"city": "{i}"}}'}
        for i in (1, 2)
    ]
    results = [
        {"type": "function_call_output", "call_id": f"c{i}", "output": [{"type": "input_text", "text": f"r{i}"}]}
        for i in (1, 2)
    ]
    said = {"role": "assistant", "content": "Wait."}
    ask(live, input=[{"role": "user", "content": "Hi"}, *calls, *results, said, calls[0]], tools=[WEATHER])
    _, _, rest = prompt_of(live).partition("|")
    assert rest == "user=Hi|assistant=!c1:weather(1)!c2:weather(2)|tool=r1#c1|tool=r2#c2|assistant=Wait.!c1:weather(1)|"


def test_calls_are_items_of_the_output_in_their_order(wide: Live) -> None:
    wide.engine.words = f"I ask. {CALL}\n{CALL}"
    answer = ask(wide, tools=[WEATHER, CLOCK])
    message, *calls = answer["output"]
    assert message["content"][0]["text"] == "I ask."
    for call in calls:
        assert (call["type"], call["name"], json.loads(call["arguments"])) == (
            "function_call",
            "weather",
            {"city": "Paris"},
        )
    assert len({call["call_id"] for call in calls}) == len({call["id"] for call in calls}) == 2
    assert [tool["name"] for tool in answer["tools"]] == ["weather", "clock"]
    assert answer["tool_choice"] == "auto"
    assert len(ask(wide, tools=[WEATHER], parallel_tool_calls=False)["output"]) == 2
    assert ask(wide, tools=[WEATHER], tool_choice="none")["output"][0]["content"][0]["text"] == wide.engine.words


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_demanded_call_is_made(stage: Stage, choice: Any) -> None:
    answer = ask(stage.live, tools=[WEATHER], tool_choice=choice, max_output_tokens=200, parallel_tool_calls=False)
    (call,) = answer["output"]
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Paris"})
    assert answer["tool_choice"] == choice


class City(BaseModel):
    city: Literal["Paris"]


def test_the_official_client_parses_an_answer_by_a_model(stage: Stage) -> None:
    answer = stage.live.openai.responses.parse(model="fake", input="Hi", text_format=City)
    assert answer.output_parsed == City(city="Paris")
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == "json_schema"


@pytest.mark.parametrize(
    ("form", "text"),
    [({"type": "json_object"}, "{}"), ({"type": "json_schema", "name": "n", "schema": {"enum": ["a"]}}, '"a"')],
)
def test_the_text_has_the_form_that_is_asked_for(stage: Stage, form: dict[str, Any], text: str) -> None:
    answer = ask(stage.live, text={"format": form})
    assert answer["output"][0]["content"][0]["text"] == text
    assert answer["text"]["format"] == form
    assert ask(stage.live, guided_choice=["yes"])["output"][0]["content"][0]["text"] == "yes"


def test_logprobs_come_with_the_text(live: Live) -> None:
    answer = live.openai.responses.create(
        model="fake", input="Hi", max_output_tokens=2, top_logprobs=2, include=["message.output_text.logprobs"]
    )
    logprobs = answer.output[0].content[0].logprobs
    assert [(one.token, one.logprob, one.bytes) for one in logprobs] == [("T", -1.5, [84]), ("h", -1.5, [104])]
    assert [top.logprob for top in logprobs[0].top_logprobs] == [-0.5, -1.5]
    assert ask(live)["output"][0]["content"][0]["logprobs"] == []


def test_the_ecosystems_extensions_are_passed_on(live: Live) -> None:
    ask(live, top_k=5, min_p=0.1, seed=7, cache_salt="s", timeout=30, ignore_eos=True, max_output_tokens=4, stop=["#"])
    last = live.engine.submitted[-1]
    assert (last.params.top_k, last.params.min_p, last.params.seed) == (5, 0.1, 7)
    assert (last.params.ignore_eos, last.params.max_tokens, last.params.stop) == (True, 4, ("#",))
    assert last.salt == "s"
    assert 29 < last.order["timeout"] < 30


def test_what_changes_nothing_is_accepted(live: Live) -> None:
    ask(
        live,
        previous_response_id=None,
        store=False,
        background=False,
        truncation="disabled",
        reasoning={"effort": None, "summary": None},
        include=["reasoning.encrypted_content"],
        service_tier="auto",
        n=1,
        text={"verbosity": "medium", "format": {"type": "text"}},
        stream=False,
        safety_identifier="x",
        prompt_cache_key="y",
    )


def test_a_model_without_a_template_does_not_respond(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(tokenizer=byte_tokenizer(chat_template=None)))
    assert check_error(live.http.post(PATH, json={"input": "Hi"}), 400)["code"] == "no_chat_template"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_ends_its_request_at_once(live: Live, stream: bool) -> None:
    live.engine.pace = 30
    with connect(live, {"input": "Hi", "stream": stream}, PATH):
        assert wait_until(lambda: len(live.engine.open) == 1)
    assert wait_until(lambda: not live.engine.open, 0.5)


def test_a_failure_of_the_engine_is_a_500(live: Live) -> None:
    live.engine.fail_after = 1
    error = check_error(live.http.post(PATH, json={"input": "Hi"}), 500)
    assert "/home" not in error["message"]
