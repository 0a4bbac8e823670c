"""The description of the API says all that is answered, and nothing else."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from server import answer_schemas as schemas
from server.config import ServerConfig
from tests.server.conftest import Live, running
from tests.server.fakes import FakeEngine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = 'So: <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "x"}),
    (COMPLETIONS, {"prompt": ["x", "y"], "n": 2, "logprobs": 2, "echo": True, "max_tokens": 60}),
    (COMPLETIONS, {"prompt": "x", "logprobs": 0, "echo": True, "max_tokens": 0}),
    (COMPLETIONS, {"prompt": "x", "kv_policy": "window"}),
    (CHAT, {"messages": HI}),
    (CHAT, {"messages": HI, "n": 2, "logprobs": True, "top_logprobs": 3, "max_tokens": 60}),
    (CHAT, {"messages": HI, "tools": [TOOL]}),
]


@pytest.fixture(scope="module")
def roomy() -> Iterator[Live]:
    """A server whose model has room for a tool."""
    with running(FakeEngine(max_model_len=1024), ServerConfig(port=0)) as live:
        yield live


def check(kind: type[BaseModel], text: str) -> None:
    """That ``text`` is of this kind, without a field more."""
    kind.model_validate_json(text, strict=True, extra="forbid")


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_answers_are_as_described(roomy: Live, path: str, body: dict[str, Any]) -> None:
    roomy.engine.words = CALL if "tools" in body else None
    answer = roomy.http.post(path, json=body)
    assert answer.status_code == 200
    check(schemas.ChatCompletion if path == CHAT else schemas.Completion, answer.text)


@pytest.mark.parametrize(
    ("kind", "path", "body"),
    [
        (schemas.Embeddings, "/v1/embeddings", {"input": ["x", "yz"]}),
        (schemas.Embeddings, "/v1/embeddings", {"input": "x", "encoding_format": "base64", "kv_policy": "window"}),
        (schemas.ResponseAnswer, "/v1/responses", {"input": "x"}),
        (schemas.ResponseAnswer, "/v1/responses", {"input": "x", "max_output_tokens": 60}),
    ],
)
def test_embeddings_and_responses_are_as_described(
    roomy: Live, kind: type[BaseModel], path: str, body: dict[str, Any]
) -> None:
    answer = roomy.http.post(path, json=body)
    assert answer.status_code == 200
    extra = "forbid" if kind is schemas.Embeddings else "allow"
    kind.model_validate_json(answer.text, strict=True, extra=extra)


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_chunks_are_as_described(roomy: Live, path: str, body: dict[str, Any], usage: bool) -> None:
    roomy.engine.words = CALL if "tools" in body else None
    answer = roomy.http.post(path, json={**body, "stream": True, "stream_options": {"include_usage": usage}})
    *events, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]"
    assert events
    for event in events:
        check(schemas.ChatCompletionChunk if path == CHAT else schemas.CompletionChunk, event)


@pytest.mark.parametrize(
    ("path", "kind"),
    {
        "/v1/models": schemas.ModelList,
        "/v1/models/fake": schemas.Model,
        "/v1/models/other": schemas.Error,
        "/health": schemas.Status,
        "/ready": schemas.Status,
        "/version": schemas.Version,
        "/tokenizer_info": schemas.TokenizerInfo,
    }.items(),
)
def test_the_rest_is_as_described(live: Live, path: str, kind: type[BaseModel]) -> None:
    check(kind, live.http.get(path).text)


def test_an_error_within_a_stream_is_as_described(live: Live) -> None:
    live.engine.fail_after = 2
    answer = live.http.post(CHAT, json={"messages": HI, "stream": True})
    check(schemas.Error, answer.text.rstrip().rpartition("data: ")[2])


def test_every_operation_says_which_errors_it_gives(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, api_key=("k",)), "k")
    description = live.http.get("/openapi.json", headers={"Authorization": "Bearer k"}).json()
    statuses = {
        path: set(operation["responses"])
        for path, operations in description["paths"].items()
        for operation in operations.values()
    }
    bodies = {"200", "400", "401", "404", "413", "415", "500"}
    assert statuses == {
        **dict.fromkeys((CHAT, COMPLETIONS, "/v1/embeddings", "/v1/responses"), bodies | {"408", "429", "503"}),
        "/tokenize": bodies,
        "/detokenize": bodies,
        "/tokenizer_info": {"200", "401", "500"},
        "/v1/models": {"200", "401", "500"},
        "/v1/models/{name}": {"200", "401", "404", "500"},
        "/health": {"200", "500", "503"},
        "/ready": {"200", "500", "503"},
        "/version": {"200", "401", "500"},
        "/metrics": {"200", "401", "500"},
    }
    responses = description["paths"][CHAT]["post"]["responses"]
    assert all("X-Request-Id" in response["headers"] for response in responses.values())
    assert {"Retry-After"} < responses["429"]["headers"].keys()
    assert responses["200"]["content"].keys() == {"application/json", "text/event-stream"}


def test_every_reference_leads_somewhere(live: Live) -> None:
    text = live.http.get("/openapi.json").text
    known = json.loads(text)["components"]["schemas"]
    named = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= known.keys()
