"""The id of a request, on whatever answers it."""

import logging
import socket
from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import OctavoError
from server.config import ServerConfig
from tests.server.conftest import Live
from tests.server.fakes import FakeEngine

ID = "0af7651916cd43dd8448eb211c80319c"


def test_a_request_id_is_given_back_or_made(live: Live) -> None:
    given = live.http.get("/version", headers={"x-request-id": "abc-123"})
    assert given.headers.get_list("x-request-id") == ["abc-123"]
    made = [live.http.get("/version").headers["x-request-id"] for _ in range(2)]
    assert [len(one) for one in made] == [32, 32]
    assert made[0] != made[1]


@pytest.mark.parametrize("odd", ["", "a b", "a" * 129, "é", "a\tb", 'a"b', "<script>"])
def test_an_odd_id_is_replaced(live: Live, odd: str) -> None:
    answer = live.http.get("/version", headers={"x-request-id": odd.encode()})
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("status", "method", "path", "body"),
    [
        (200, "GET", "/health", None),
        (200, "GET", "/docs", None),
        (200, "POST", "/v1/completions", {"prompt": "x"}),
        (200, "POST", "/v1/completions", {"prompt": "x", "stream": True}),
        (400, "POST", "/v1/completions", {"prompt": 5}),
        (404, "GET", "/nothing", None),
        (404, "POST", "/v1/completions", {"prompt": "x", "model": "nobody"}),
        (405, "GET", "/v1/completions", None),
    ],
)
def test_every_answer_has_it(live: Live, status: int, method: str, path: str, body: dict[str, Any] | None) -> None:
    answer = live.http.request(method, path, json=body, headers={"x-request-id": ID})
    assert answer.status_code == status
    assert answer.headers["x-request-id"] == ID


def test_so_has_a_401(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, api_key="key"))
    answer = live.http.get("/v1/models", headers={"x-request-id": ID})
    assert (answer.status_code, answer.headers["x-request-id"]) == (401, ID)


@pytest.mark.parametrize("failure", [ValueError("at /home/user"), OctavoError("at /home/user")])
def test_a_failure_of_the_server_is_answered_and_logged_with_it(
    live: Live, failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(live.engine, "submit", fail)
    answer = live.http.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": ID})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, ID)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "/home" not in answer.text
    (record,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert record.fields == {"request_id": ID}


def test_a_failure_in_a_stream_is_logged_with_it(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    live.engine.fail_after = 3
    body = {"prompt": "x", "stream": True}
    answer = live.http.post("/v1/completions", json=body, headers={"x-request-id": ID})
    assert "engine_error" in answer.text
    assert [record.fields for record in caplog.records if record.levelno >= logging.ERROR] == [{"request_id": ID}]


def test_what_is_not_even_http_gets_one_too(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    with (
        caplog.at_level(logging.DEBUG, "octavo.server"),
        socket.create_connection((host, int(port)), timeout=10) as connection,
    ):
        connection.sendall(b"nonsense\r\n\r\n")
        received = connection.makefile("rb").read().decode()
    (made,) = (line.partition(": ")[2] for line in received.splitlines() if line.startswith("x-request-id"))
    assert [record.fields for record in caplog.records if record.name == "octavo.server"] == [{"request_id": made}]
