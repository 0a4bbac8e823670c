"""Tools: what the model is told of them, how its calls come out, and calls that it has to make."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from server.config import ServerConfig
from tests.server.conftest import Live
from tests.server.fakes import FakeEngine, byte_tokenizer
from tests.server.obedient import obedient
from tests.server.scripted import Stage, staged

CHAT = "/v1/chat/completions"
ASKED = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Paris"]}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NATIVE = (
    "{% if tools %}{{ tools | tojson }}|{% endif %}{% for m in messages %}{{ m.role }}={{ m.content }}"
    "{% for c in m.tool_calls or [] %}!{{ c.id }}:{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}"
    "{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}|{% endfor %}"
)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """A real engine around a model that says as little as its grammar lets it."""
    from engine.memory import MemoryPlan

    plan = MemoryPlan(num_blocks=512, num_host_blocks=0, max_model_len=4096)
    with staged(ServerConfig(port=0), script=obedient, max_num_seqs=4, plan=plan) as stage:
        yield stage


def ask(live: Live, **fields: Any) -> httpx.Response:
    return live.http.post(CHAT, json={"messages": ASKED, "tools": TOOLS, "max_tokens": 300, **fields})


def message(live: Live, **fields: Any) -> dict[str, Any]:
    (choice,) = ask(live, **fields).json()["choices"]
    return dict(choice["message"])


def prompt_of(live: Live) -> str:
    return live.engine.tokenizer.decode(live.engine.submitted[-1].prompt)


def called(said: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in said["tool_calls"]]


# What the model does of itself


def test_a_call_is_a_call_and_no_text(wide: Live) -> None:
    wide.engine.words = CALL
    (choice,) = ask(wide).json()["choices"]
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None}
    assert choice["finish_reason"] == "tool_calls"
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


def test_words_before_calls_are_content(wide: Live) -> None:
    wide.engine.words = f"I ask. {CALL}\n{CALL}"
    said = message(wide)
    assert said["content"] == "I ask."
    assert called(said) == [("weather", {"city": "Paris"})] * 2
    assert len({call["id"] for call in said["tool_calls"]}) == 2
    assert len(message(wide, parallel_tool_calls=False)["tool_calls"]) == 1


def test_an_answer_without_calls_is_an_answer(wide: Live) -> None:
    wide.engine.words = "It is < 3 degrees."
    (choice,) = ask(wide).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": "It is < 3 degrees.", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_a_call_that_is_cut_off_says_so(wide: Live) -> None:
    wide.engine.words = CALL
    (choice,) = ask(wide, max_tokens=60).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == CALL[:60].partition('arguments": ')[2]


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": []}, {"tools": None}])
def test_without_tools_calls_are_text(wide: Live, fields: dict[str, Any]) -> None:
    wide.engine.words = CALL
    assert message(wide, **fields)["content"] == CALL
    assert "weather" not in prompt_of(wide)


def test_a_stream_tells_the_name_first_and_the_arguments_in_pieces(wide: Live) -> None:
    wide.engine.words = f"Well: {CALL}\n{CALL}"
    stream = wide.openai.chat.completions.create(
        model="fake", messages=ASKED, tools=TOOLS, stream=True, n=2, logprobs=True, max_tokens=300
    )
    chunks = list(stream)
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in own) == "Well:"
        deltas = [delta for one in own for delta in one.delta.tool_calls or ()]
        for number in (0, 1):
            first, *rest = [delta for delta in deltas if delta.index == number]
            assert (first.function.name, first.function.arguments, first.type) == ("weather", "", "function")
            assert first.id
            assert len(rest) > 3, "pieces"
            assert all(one.id is None and one.function.name is None for one in rest)
            assert "".join(one.function.arguments for one in rest) == '{"city": "Paris"}'
        assert [one.finish_reason for one in own if one.finish_reason] == ["tool_calls"]
        assert own[-1].finish_reason
        assert all(one.finish_reason or one.logprobs or one.delta.model_dump(exclude_none=True) for one in own)
        counted = [token for one in own if one.logprobs for token in one.logprobs.content]
        assert len(counted) == len(f"Well: {CALL}\n{CALL}"), "each token's log-probability once"


def test_a_stream_without_calls_is_the_whole_text(wide: Live) -> None:
    wide.engine.words = "a <tool_cal> b \n"
    stream = wide.openai.chat.completions.create(model="fake", messages=ASKED, tools=TOOLS, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "a <tool_cal> b \n"


@pytest.mark.parametrize(
    ("parser", "words"),
    [
        ("llama3", '{"name": "weather", "parameters": {"city": "Paris"}}'),
        ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]'),
    ],
)
def test_other_families_calls_are_read_by_their_parsers(start: Callable[..., Live], parser: Any, words: str) -> None:
    live = start(FakeEngine(max_model_len=4096, words=words), ServerConfig(port=0, tool_parser=parser))
    assert called(message(live)) == [("weather", {"city": "Paris"})]


@pytest.mark.parametrize("stream", [False, True])
def test_a_marker_that_is_a_special_token_is_seen_though_it_has_no_text(
    start: Callable[..., Live], stream: bool
) -> None:
    tokenizer = byte_tokenizer(chat_template="[TOOL_CALLS]")
    tokenizer.backend.add_special_tokens(["[TOOL_CALLS]"])
    words = 'Oh. [TOOL_CALLS] [{"name": "clock", "arguments": {}}]'
    live = start(FakeEngine(tokenizer=tokenizer, max_model_len=4096, words=words))
    answer = ask(live, stream=stream).text
    assert "TOOL" not in answer
    assert '"name": "clock"' in answer
    assert '"finish_reason": "tool_calls"' in answer


# What it is told


def test_a_template_without_tools_gets_them_as_a_system_message(wide: Live) -> None:
    ask(wide, messages=[{"role": "system", "content": "Be kind."}, *ASKED])
    text = prompt_of(wide)
    assert text.startswith("<|system|>Be kind.\n\nYou can call these functions.")
    assert json.dumps(WEATHER) in text
    assert '<tool_call>\n{"name": "function-name"' in text
    ask(wide)
    assert prompt_of(wide).startswith("<|system|>You can call these functions.")


TALK: list[dict[str, Any]] = [
    *ASKED,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
            {"id": "call_2", "type": "function", "function": {"name": "clock", "arguments": "broken"}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
]


def test_calls_and_their_results_are_text_where_a_template_has_no_tools(wide: Live) -> None:
    ask(wide, messages=TALK, tools=None)
    assert prompt_of(wide) == (
        f'<|user|>Hi\n<|assistant|>{CALL}\n<tool_call>\n{{"name": "clock", "arguments": "broken"}}\n</tool_call>\n'
        "<|user|><tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response>\n<|assistant|>"
    )


def test_a_template_with_tools_gets_them_as_they_are(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(tokenizer=byte_tokenizer(chat_template=NATIVE), max_model_len=4096))
    ask(live, messages=TALK)
    assert prompt_of(live) == (
        f"{json.dumps([WEATHER, CLOCK])}|user=Hi|assistant=!call_1:weather(Paris)!call_2:clock()|"
        "tool=rain#call_1|tool=noon#call_2|"
    )


def test_an_answer_can_be_sent_back_with_its_calls(wide: Live) -> None:
    wide.engine.words = CALL
    answer = wide.openai.chat.completions.create(model="fake", messages=ASKED, tools=TOOLS, max_tokens=300)
    said = answer.choices[0].message
    assert said.tool_calls
    result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": [{"type": "text", "text": "rain"}]}
    assert ask(wide, messages=[*ASKED, said.model_dump(), result]).status_code == 200


def test_a_conversation_can_be_tokenized_with_its_tools(wide: Live) -> None:
    ask(wide)
    tokens = wide.http.post("/tokenize", json={"messages": ASKED, "tools": TOOLS}).json()["tokens"]
    assert tokens == list(wide.engine.submitted[-1].prompt)


# What it has to do


def test_a_named_tool_is_called_with_arguments_that_fit(stage: Stage) -> None:
    (choice,) = ask(stage.live, tool_choice={"type": "function", "function": {"name": "weather"}}).json()["choices"]
    assert called(choice["message"]) == [("weather", {"city": "Paris"})]
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"


def test_a_required_call_is_one_of_the_tools(stage: Stage) -> None:
    assert called(message(stage.live, tool_choice="required", tools=[CLOCK])) == [("clock", {})]
    assert called(message(stage.live, tool_choice="required"))[0][0] in ("weather", "clock")


def test_required_calls_stream(stage: Stage) -> None:
    stream = stage.live.openai.chat.completions.create(
        model="fake", messages=ASKED, tools=[WEATHER], tool_choice="required", stream=True
    )
    deltas = [delta for chunk in stream for delta in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].function.name == "weather"
    assert json.loads("".join(one.function.arguments for one in deltas)) == {"city": "Paris"}


@pytest.mark.parametrize("parser", ["hermes", "llama3", "mistral"])
def test_every_family_can_be_made_to_call(parser: Any) -> None:
    from engine.memory import MemoryPlan

    plan = MemoryPlan(num_blocks=512, num_host_blocks=0, max_model_len=4096)
    with staged(ServerConfig(port=0, tool_parser=parser), script=obedient, plan=plan) as stage:
        assert called(message(stage.live, tools=[WEATHER], tool_choice="required")) == [("weather", {"city": "Paris"})]


def test_tools_and_a_form_leave_the_model_the_choice(stage: Stage) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["x"]}}}
    said = message(stage.live, response_format=form)
    assert said["content"] == '"x"'
    assert called(message(stage.live, response_format=form, tool_choice="required", tools=[CLOCK])) == [("clock", {})]


def test_a_tool_whose_parameters_are_no_schema_is_a_400_when_it_must_be_called(wide: Live) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "objekt"}}}}}
    assert ask(wide, tools=[bad]).status_code == 200
    error = ask(wide, tools=[bad], tool_choice="required").json()["error"]
    assert error["param"] == "tools"
    assert "objekt" in error["message"]


def test_a_strict_tool_promises_what_it_can_keep(wide: Live) -> None:
    function: dict[str, Any] = {"name": "f", "parameters": {"not": {}}}
    assert ask(wide, tools=[{"type": "function", "function": function}], tool_choice="required").status_code == 200
    function["strict"] = True
    assert ask(wide, tools=[{"type": "function", "function": function}], tool_choice="required").status_code == 400
