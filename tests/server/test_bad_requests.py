"""Requests that are none, or too much: a 4xx in OpenAI's shape, nothing given away, and the server serves on."""

import json
import socket
from collections.abc import Callable
from typing import Any

import openai
import pytest

from server.config import ServerConfig
from tests.server.conftest import Live
from tests.server.fakes import FakeEngine
from tests.server.refusals import check_error

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
HI = {"role": "user", "content": "Hi"}
QUESTIONS: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "x"},
    CHAT: {"messages": [{"role": "user", "content": "x"}]},
    RESPONSES: {"input": "x"},
    EMBEDDINGS: {"input": "x"},
}
"""To each a sound request."""


@pytest.mark.parametrize("path", QUESTIONS)
@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        '{QUESTION, "timeout": NaN}',
        '{QUESTION, "timeout": 1e999}',
        '{QUESTION, "user": "\\ud800"}',
        '{QUESTION, "user": ' + "[" * 100_000,
        '{"x": ' * 10_000,
        '{"n": ' + "9" * 10_000 + "}",
    ],
    ids=lambda body: str(body)[:40],
)
def test_bytes_that_are_not_a_sound_request_are_a_400(live: Live, path: str, body: str | bytes) -> None:
    question = json.dumps(QUESTIONS[path])[1:-1]
    content = body.replace("QUESTION", question) if isinstance(body, str) else body
    check_error(live.http.post(path, content=content, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("path", QUESTIONS)
def test_a_lone_surrogate_is_no_text(live: Live, path: str) -> None:
    content = json.dumps(QUESTIONS[path]).replace('"x"', '"\\ud800"')
    check_error(live.http.post(path, content=content, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
@pytest.mark.parametrize("number", ["NaN", "1e999"])
def test_a_temperature_that_is_no_number_is_a_400(live: Live, path: str, number: str) -> None:
    content = f'{json.dumps(QUESTIONS[path])[:-1]}, "temperature": {number}}}'
    error = check_error(live.http.post(path, content=content, headers={"content-type": "application/json"}), 400)
    assert error["param"] == "temperature"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/v1/moderations", 404),
        ("GET", EMBEDDINGS, 405),
        ("GET", RESPONSES, 405),
        ("POST", "/v1/responses/resp_1/cancel", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
    ],
)
def test_a_wrong_url_or_method_has_openais_shape_too(live: Live, method: str, path: str, status: int) -> None:
    check_error(live.http.request(method, path), status)


@pytest.mark.parametrize("path", QUESTIONS)
def test_a_model_that_is_not_served_is_a_404(live: Live, path: str) -> None:
    body = {**QUESTIONS[path], "model": "gpt-9"}
    error = check_error(live.http.post(path, json=body), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        live.openai.completions.create(model="gpt-9", prompt="x")


def test_a_body_that_is_not_json_by_its_own_account_is_a_415(live: Live) -> None:
    check_error(live.http.post(COMPLETIONS, data={"prompt": "x"}), 415)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a" * 300},
        {"prompt": [1] * 256},
        {"prompt": [1] * 100_000},
        {"prompt": [[1], [1] * 100_000]},
        {"prompt": "a" * 200, "max_tokens": 100},
        {"prompt": ["a", "a" * 300]},
        {"prompt": "a" * 2_000_000},
        {"messages": [{"role": "user", "content": "a" * 300}]},
        {"messages": [HI], "max_tokens": 300},
        {"input": "a" * 256},
        {"input": [1] * 257},
        {"input": [[1], [1] * 100_000]},
        {"input": ["a", "a" * 2_000_000]},
    ],
    ids=lambda body: str(body)[:30],
)
def test_more_than_the_context_length_is_told_by_its_code(live: Live, body: dict[str, object]) -> None:
    path = {"prompt": COMPLETIONS, "messages": CHAT, "input": EMBEDDINGS}[next(iter(body))]
    error = check_error(live.http.post(path, json=body), 400)
    assert error["code"] == "context_length_exceeded"
    assert "256" in error["message"]


@pytest.mark.parametrize("count", [257, 2**20 + 1])
def test_more_ids_than_a_context_are_not_put_into_text(live: Live, count: int) -> None:
    error = check_error(live.http.post("/detokenize", json={"tokens": [1] * count}), 400)
    assert error["param"] == "tokens"


def test_a_body_of_too_many_parts_is_refused_before_they_are_built(live: Live) -> None:
    error = check_error(live.http.post(COMPLETIONS, json={"prompt": "x", "guided_json": [[]] * 70_000}), 400)
    assert "lists and objects" in error["message"]
    brackets = {"prompt": "x", "nobody_reads_this": '["\\' * 70_000}  # in a text they are only text
    assert live.http.post(COMPLETIONS, json=brackets).status_code == 200
    check_error(live.http.post(COMPLETIONS, content=b'{"prompt": "' + b'[\\"' * 100_000), 400)


def test_a_body_over_the_limit_is_a_413(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, max_body_size=1000))
    check_error(live.http.post(COMPLETIONS, json={"prompt": "a" * 2000}), 413)

    def pieces() -> Any:
        yield b'{"prompt": "'
        for _ in range(20):
            yield b"a" * 100

    headers = {"content-type": "application/json"}
    check_error(live.http.post(COMPLETIONS, content=pieces(), headers=headers), 413)
    assert live.http.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200


def test_an_engine_that_is_not_ready_is_a_503(live: Live) -> None:
    live.engine.ready = False
    check_error(live.http.post(COMPLETIONS, json={"prompt": "x"}), 503)
    check_error(live.http.get("/ready"), 503)
    assert live.http.get("/health").status_code == 200


def test_a_dead_engine_fails_health_and_every_request(live: Live) -> None:
    live.engine.healthy = False
    check_error(live.http.get("/health"), 503)
    check_error(live.http.get("/ready"), 503)
    answer = live.http.post(COMPLETIONS, json={"prompt": ["x", "y"]})
    assert check_error(answer, 500)["code"] == "engine_dead"
    assert "/home" not in answer.text


def raw(live: Live, data: bytes) -> bytes:
    """Send bytes, read until the server hangs up."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        received = b""
        try:
            connection.sendall(data)
            while piece := connection.recv(65536):
                received += piece
        except ConnectionError:
            pass
        return received


@pytest.mark.parametrize(
    "data",
    [
        b"this is not HTTP\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"x-padding: " + b"a" * 500_000,
        b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 100_000,
    ],
    ids=["garbage", "a long header", "many headers"],
)
def test_malformed_http_is_refused_in_openais_shape(live: Live, data: bytes) -> None:
    head, _, body = raw(live, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
