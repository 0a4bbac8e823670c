"""Fields of other types, out of their ranges or against each other: a 400 that names the field."""

import json

import pytest

from tests.server.conftest import Live
from tests.server.refusals import check_error
from tests.server.test_bad_embeddings import REFUSED as EMBEDDINGS_REFUSED
from tests.server.test_bad_responses import REFUSED as RESPONSES_REFUSED

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HI = {"role": "user", "content": "Hi"}


def completion(**fields: object) -> tuple[str, dict[str, object]]:
    return COMPLETIONS, {"prompt": "x", **fields}


def chat(**fields: object) -> tuple[str, dict[str, object]]:
    return CHAT, {"messages": [HI], **fields}


def said(**fields: object) -> tuple[str, dict[str, object]]:
    return CHAT, {"messages": [fields]}


def tool(name: str, **fields: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, **fields}}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REFUSED: list[tuple[tuple[str, object], str | None]] = [
    ((COMPLETIONS, {}), "prompt"),
    ((COMPLETIONS, []), None),
    ((COMPLETIONS, "text"), None),
    ((COMPLETIONS, None), None),
    (completion(prompt=None), "prompt"),
    (completion(prompt=[]), "prompt"),
    (completion(prompt=[[]]), "prompt"),
    (completion(prompt=5), "prompt"),
    (completion(prompt=["a", 1]), "prompt"),
    (completion(prompt=[1, True]), "prompt"),
    (completion(prompt=[1.0]), "prompt"),
    (completion(prompt=[[1], "a"]), "prompt"),
    (completion(prompt=[-1]), "prompt"),
    (completion(prompt=[258]), "prompt"),
    (completion(prompt=[2**70]), "prompt"),
    (completion(prompt={"a": 1}), "prompt"),
    (completion(prompt=["a"] * 2049), "prompt"),
    (completion(prompt=[[1]] * 2049), "prompt"),
    (completion(prompt="", add_special_tokens=False), "prompt"),
    (completion(n=True), "n"),
    (completion(n="3"), "n"),
    (completion(n=1.0), "n"),
    (completion(n=0), "n"),
    (completion(n=129), "n"),
    (completion(n=2**80), "n"),
    (completion(prompt=["a"] * 100, n=100), "n"),
    (completion(n=3, best_of=2), "best_of"),
    (completion(best_of=0), "best_of"),
    (completion(best_of=129), "best_of"),
    (completion(best_of=2.0), "best_of"),
    (completion(best_of=3, stream=True), "stream"),
    (completion(prompt=["a"] * 100, best_of=100), "best_of"),
    (completion(prompt=["a"] * 100, n=2, best_of=100, use_beam_search=True), "best_of"),
    (completion(prompt=["a"] * 100, n=100, use_beam_search=True), "n"),
    (completion(max_tokens=-1), "max_tokens"),
    (completion(max_tokens=0), "max_tokens"),
    (completion(max_tokens="16"), "max_tokens"),
    (completion(temperature=-0.1), "temperature"),
    (completion(temperature=2.5), "temperature"),
    (completion(temperature=True), "temperature"),
    (completion(temperature="1"), "temperature"),
    (completion(top_p=0), "top_p"),
    (completion(top_p=1.1), "top_p"),
    (completion(top_k=-2), "top_k"),
    (completion(min_p=1.5), "min_p"),
    (completion(presence_penalty=3), "presence_penalty"),
    (completion(frequency_penalty=-3), "frequency_penalty"),
    (completion(repetition_penalty=0), "repetition_penalty"),
    (completion(seed=1.5), "seed"),
    (completion(seed=2**63), "seed"),
    (completion(logit_bias={"1": 101}), "logit_bias.1"),
    (completion(logit_bias={"999": 1}), "logit_bias"),
    (completion(logit_bias={"a": 1}), "logit_bias.a.[key]"),
    (completion(logit_bias=[1]), "logit_bias"),
    (completion(stop=["a"] * 5), "stop"),
    (completion(stop=""), "stop"),
    (completion(stop=[1]), "stop"),
    (completion(stop="a" * 2000), "stop"),
    (completion(stop_token_ids=[999]), "stop_token_ids"),
    (completion(stop_token_ids=["1"]), "stop_token_ids[0]"),
    (completion(min_tokens=50, max_tokens=5), "min_tokens"),
    (completion(logprobs=6), "logprobs"),
    (completion(logprobs=True), "logprobs"),
    (completion(echo=1), "echo"),
    (completion(stream="true"), "stream"),
    (completion(stream_options={"include_usage": True}), "stream_options"),
    (completion(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage"),
    (completion(suffix="end"), "suffix"),
    (completion(use_beam_search=1), "use_beam_search"),
    (completion(use_beam_search="true"), "use_beam_search"),
    (completion(use_beam_search=True, stream=True), "stream"),
    (completion(use_beam_search=True, n=3, best_of=2), "best_of"),
    (completion(length_penalty=0.5), "length_penalty"),
    (completion(early_stopping=True), "early_stopping"),
    (completion(early_stopping="never"), "early_stopping"),
    *(
        (completion(use_beam_search=True, **{name: value}), name)
        for name, value in {
            "length_penalty": 11,
            "early_stopping": 1,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 1,
            "min_p": 0.1,
            "presence_penalty": 1,
            "frequency_penalty": 1,
            "repetition_penalty": 1.1,
            "logit_bias": {"1": 1},
            "stop": "a",
        }.items()
    ),
    (completion(use_beam_search=True, early_stopping="always"), "early_stopping"),
    *(
        (make(**{name: value}), param or name)
        for make in (completion, chat)
        for name, value, param in (
            ("guided_json", [], None),
            ("guided_json", {"type": "objekt"}, None),
            ("guided_json", '{"type":', None),
            ("guided_json", "[" * 10_000, None),
            ("guided_json", "[]", None),
            ("guided_json", "9" * 5000, None),
            ("guided_json", '{}\nstart: "not JSON"', None),
            ("guided_json", {"const": "x" * 200_000}, None),
            ("guided_json", {"items": [{"pattern": "a?" * 3000, "minLength": 5}] * 2}, None),
            ("guided_json", {"patternProperties": {"a?" * 5000: {}}}, None),
            ("guided_json", json.dumps({"pattern": "a" * 9000}), None),
            ("structured_outputs", {"json": {"pattern": "a" * 9000}}, "structured_outputs.json"),
            (
                "response_format",
                {"type": "json_schema", "json_schema": {"schema": {"pattern": "a" * 9000}}},
                "response_format.json_schema.schema",
            ),
            ("guided_json", {"properties": {"a": {"format": "shape"}}}, None),
            ("guided_regex", "[a", None),
            ("guided_regex", "a" * 4097, None),
            ("guided_regex", 1, None),
            ("guided_choice", [], None),
            ("guided_choice", "yes", None),
            ("guided_choice", [1], "guided_choice[0]"),
            ("guided_choice", ["a"] * 1025, None),
            ("guided_choice", ["a" * 100_000], None),
            ("guided_grammar", "start: nothing", None),
            ("guided_grammar", "a" * 16_385, None),
            ("structured_outputs", {"regex": "[a"}, None),
            ("structured_outputs", {"regex": "a", "choice": ["a"]}, None),
            ("response_format", "json", None),
            ("response_format", {"type": "xml"}, "response_format.type"),
            ("response_format", {"type": "json_schema"}, None),
            ("response_format", {"type": "text", "json_schema": {"schema": {}}}, None),
            ("response_format", {"type": "json_schema", "json_schema": {}}, "response_format.json_schema.schema"),
            ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": 1}}}, None),
            (
                "response_format",
                {"type": "json_schema", "json_schema": {"schema": {"not": {}}, "strict": True}},
                None,
            ),
        )
    ),
    (completion(guided_regex="a", response_format={"type": "json_object"}), "response_format"),
    *(
        (make(kv_policy=value), "kv_policy")
        for make in (completion, chat)
        for value in (
            "h9",
            "",
            True,
            1,
            [],
            ["streaming"],
            {},
            {"type": None},
            {"type": ["streaming"]},
            {"window": 8},
            {"type": "h9"},
            {"type": "full", "window": 8},
            {"type": "window", "window": 0},
            {"type": "window", "window": -1},
            {"type": "window", "window": "8"},
            {"type": "window", "window": 8.5},
            {"type": "window", "window": True},
            {"type": "window", "window": None},
            {"type": "window", "window": [8]},
            {"type": "window", "window": 2**31},
            {"type": "window", "window": 10**4000},
            {"type": "streaming", "sinks": 0},
            {"type": "streaming", "sinks": 2**63},
            {"type": "streaming", "wind\u00f6w": 8},
            {"type": "streaming", "x" * 5000: 8},
        )
    ),
    (completion(kv_policy="streaming", max_tokens=1_000_001), "max_tokens"),
    (completion(kv_policy="streaming", max_tokens=2**31 - 1), "max_tokens"),
    (completion(kv_policy="streaming", max_tokens=2**31), "max_tokens"),
    (completion(kv_policy="streaming", max_tokens=1000, n=128, prompt=["x"] * 8), "max_tokens"),
    (chat(kv_policy="streaming", max_tokens=1_000_001), "max_tokens"),
    (completion(cache_salt=""), "cache_salt"),
    (completion(user="u" * 1025), "user"),
    (completion(user=1), "user"),
    (completion(priority=True), "priority"),
    (completion(priority="3"), "priority"),
    (completion(priority=1.5), "priority"),
    (completion(priority=2**31), "priority"),
    (completion(priority=-(2**31) - 1), "priority"),
    (completion(timeout=0), "timeout"),
    (completion(timeout=-1), "timeout"),
    (completion(timeout="5"), "timeout"),
    (completion(timeout=True), "timeout"),
    (completion(timeout=86401), "timeout"),
    (completion(model=1), "model"),
    ((CHAT, {}), "messages"),
    ((CHAT, {"messages": []}), "messages"),
    ((CHAT, {"messages": "Hi"}), "messages"),
    ((CHAT, {"messages": [1]}), "messages[0]"),
    (said(role="user"), "messages[0]"),
    (said(role="emperor", content="x"), "messages[0].role"),
    (said(content="x"), "messages[0].role"),
    (said(role="user", content=1), "messages[0].content"),
    (said(role="user", content=["x"]), "messages[0].content"),
    (said(role="user", content=[{"type": "image_url", "image_url": {"url": "http://x"}}]), "messages[0].content"),
    (said(role="user", content=[{"type": "text"}]), "messages[0].content"),
    (said(role="tool"), "messages[0]"),
    (said(role="function", content="x"), "messages[0]"),
    (said(role="assistant", tool_calls=[]), "messages[0]"),
    (said(role="assistant", tool_calls=[{"id": "1"}]), "messages[0].tool_calls[0].function"),
    (said(role="assistant", tool_calls=[{"id": 1, "function": {}}]), "messages[0].tool_calls[0].id"),
    (said(role="user", content="x", tool_calls=[CALL]), "messages[0]"),
    (said(role="assistant", tool_calls=[CALL] * 129), "messages[0].tool_calls"),
    ((CHAT, {"messages": [HI, {"role": "system", "content": "late"}]}), "messages"),
    ((CHAT, {"messages": [HI] * 4097}), "messages"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(max_tokens=1, max_completion_tokens=2), "max_tokens"),
    (chat(priority=1.5), "priority"),
    (chat(timeout=0), "timeout"),
    (chat(n=2, best_of=1), "best_of"),
    (chat(best_of=2, stream=True), "stream"),
    (chat(use_beam_search=True, stream=True), "stream"),
    (chat(use_beam_search=True, temperature=1), "temperature"),
    (chat(length_penalty=2.0), "length_penalty"),
    (chat(logprobs=1), "logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(top_logprobs=2), "top_logprobs"),
    (chat(tools=[{"type": "function"}]), "tools[0].function"),
    (chat(tools=[{"type": "web", "function": {"name": "f"}}]), "tools[0].type"),
    (chat(tools=[tool("")]), "tools[0].function.name"),
    (chat(tools=[tool("a b")]), "tools[0].function.name"),
    (chat(tools=[tool("a" * 65)]), "tools[0].function.name"),
    (chat(tools=[tool("f", parameters=[])]), "tools[0].function.parameters"),
    (chat(tools=[tool("f"), tool("f")]), "tools"),
    (chat(tools=[tool(name, parameters={"pattern": "a" * 5000}) for name in "fg"]), "tools"),
    (chat(tools=[tool(f"f{i}") for i in range(129)]), "tools"),
    (chat(tools=[tool("f", description="x" * 70_000)]), "tools"),
    (chat(tools=[tool("f")], tool_choice="sometimes"), "tool_choice"),
    (chat(tools=[tool("f")], tool_choice={"type": "function", "function": {"name": "g"}}), "tool_choice"),
    (chat(tools=[tool("f")], tool_choice={"type": "function"}), "tool_choice"),
    (chat(tools=[tool("f")], tool_choice={"name": "f"}), "tool_choice"),
    (chat(tools=[tool("f")], parallel_tool_calls=1), "parallel_tool_calls"),
    (chat(tools=[tool("f")], guided_regex="a"), "guided_regex"),
    (chat(tools=[tool("f")], tool_choice="required", guided_json={}), "guided_json"),
    (chat(tool_choice="required"), "tool_choice"),
    (chat(tool_choice={"type": "function", "function": {"name": "f"}}), "tool_choice"),
    (chat(functions=[{"name": "f"}]), "functions"),
    (chat(modalities=["audio"]), "modalities"),
    (chat(chat_template="{{ 1 }}"), "chat_template"),
    (chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs"),
    (chat(chat_template_kwargs={"a": [[0] * 100] * 50}), "chat_template_kwargs"),
    (("/tokenize", {}), "prompt"),
    (("/tokenize", {"prompt": "a", "messages": [HI]}), "prompt"),
    (("/detokenize", {"tokens": ["1"]}), "tokens[0]"),
    (("/detokenize", {"tokens": [258]}), "tokens"),
]


@pytest.mark.parametrize(("request_", "param"), REFUSED, ids=lambda value: str(value)[:70])
def test_a_bad_field_is_a_400_that_names_it(live: Live, request_: tuple[str, object], param: str | None) -> None:
    path, body = request_
    assert check_error(live.http.post(path, json=body), 400)["param"] == param


def test_a_hostile_request_leaves_a_neighbours_stream_unchanged(live: Live) -> None:
    alone = live.http.post(COMPLETIONS, json={"prompt": "me", "max_tokens": 60}).json()["choices"][0]["text"]
    live.engine.pace = 0.002
    stream = live.openai.completions.create(model="fake", prompt="me", max_tokens=60, stream=True)
    text = next(stream).choices[0].text
    hostile = [request for request, _ in REFUSED[::4]]
    hostile += [("/v1/embeddings", {"input": "x", **fields}) for fields, _ in EMBEDDINGS_REFUSED[::4]]
    hostile += [("/v1/responses", {"input": "x", **fields}) for fields, _ in RESPONSES_REFUSED[::4]]
    for path, body in hostile:
        check_error(live.http.post(path, json=body), 400)
    assert text + "".join(chunk.choices[0].text for chunk in stream) == alone
