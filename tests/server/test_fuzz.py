"""Whatever JSON a client sends, it is no failure of the server."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kv_policies.registry import POLICIES
from server.embeddings import EmbeddingRequest
from server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from server.response_request import ResponseRequest
from tests.server.conftest import Live

MODELS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponseRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
SOUND: dict[str, Any] = {"prompt": "x", "input": "x", "messages": [{"role": "user", "content": "x"}], "tokens": [1]}

texts = st.one_of(st.text(max_size=20), st.sampled_from(["user", "assistant", "text", "full", "fake", "\x00", "</s>"]))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.floats(-3, 3),
    texts,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
message = st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls", "type", "text"]), values)
kinds = st.sampled_from(["message", "function_call", "function_call_output"])
item = st.fixed_dictionaries(
    {},
    optional={
        "type": kinds,
        "role": st.sampled_from(["user", "assistant", "system", "developer"]),
        "content": st.one_of(texts, st.lists(st.fixed_dictionaries({"type": st.just("input_text"), "text": texts}))),
        **dict.fromkeys(["call_id", "name", "arguments", "output"], texts),
    },
)
function = st.fixed_dictionaries({"type": st.just("function"), "name": texts}, optional={"parameters": values})
calm = settings(
    deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def check(live: Live, path: str, body: object) -> None:
    # Python writes NaN and Infinity as they stand, and lone surrogates as escapes: just what a server must refuse.
    content = json.dumps(body).encode()
    answer = live.http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert sorted(answer.json()["error"]) == ["code", "message", "param", "type"]


@pytest.mark.parametrize("path", MODELS)
def test_arbitrary_values_of_known_fields_never_give_a_500(live: Live, path: str) -> None:
    names = st.sampled_from(sorted(MODELS[path].model_fields))

    @calm
    @given(st.dictionaries(names, values, max_size=5))
    def run(fields: dict[str, Any]) -> None:
        sound = {name: value for name, value in SOUND.items() if name in MODELS[path].model_fields}
        if path == "/tokenize":
            del sound["messages"]
        check(live, path, {**sound, **fields})

    run()


@pytest.mark.parametrize("path", MODELS)
def test_arbitrary_json_never_gives_a_500(live: Live, path: str) -> None:
    @settings(calm, max_examples=40)
    @given(values)
    def run(body: object) -> None:
        check(live, path, body)

    run()


@pytest.mark.parametrize("name", POLICIES)
def test_arbitrary_fields_of_a_policy_never_give_a_500(live: Live, name: str) -> None:
    known = sorted(field.name for field in dataclasses.fields(POLICIES[name]))
    fields = st.dictionaries(st.one_of(st.sampled_from(known), texts) if known else texts, scalars, max_size=4)

    @calm
    @given(fields, st.integers(0, 2**32))
    def run(fields: dict[str, Any], max_tokens: int) -> None:
        policy = {**fields, "type": name}
        check(live, "/v1/completions", {"prompt": "x", "kv_policy": policy, "max_tokens": max_tokens})

    run()


def test_arbitrary_messages_never_give_a_500(live: Live) -> None:
    @calm
    @given(st.lists(st.one_of(message, values), max_size=3))
    def run(messages: list[object]) -> None:
        check(live, "/v1/chat/completions", {"messages": messages, "max_tokens": 4})

    run()


@pytest.mark.parametrize("stream", [False, True])
def test_arbitrary_items_and_tools_never_give_a_500(live: Live, stream: bool) -> None:
    @calm
    @given(st.lists(st.one_of(item, values), max_size=3), st.lists(st.one_of(function, values), max_size=2))
    def run(items: list[object], tools: list[object]) -> None:
        body = {"input": items, "tools": tools, "stream": stream, "max_output_tokens": 4}
        check(live, "/v1/responses", body)

    run()


def test_arbitrary_bytes_never_give_a_500(live: Live) -> None:
    @settings(calm, max_examples=60)
    @given(st.binary(max_size=60))
    def run(content: bytes) -> None:
        answer = live.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400

    run()
