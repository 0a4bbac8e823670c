"""A client that leaves, or does not read, costs nothing from that moment on."""

import contextlib
import json
import socket
import time
from collections.abc import Callable

import pytest

from server.config import ServerConfig
from server.listener import MAX_SENT_AHEAD
from tests.server.conftest import Live, wait_until
from tests.server.fakes import FakeEngine


def connect(live: Live, body: dict[str, object], path: str = "/v1/completions") -> socket.socket:
    """Send a request and leave the connection open."""
    host, port = live.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("prompt", ["one", ["one", "two", "three"]], ids=["one prompt", "three prompts"])
def test_a_client_that_leaves_ends_its_request_at_once(live: Live, stream: bool, prompt: object) -> None:
    live.engine.pace = 0.01
    aborted = len(live.engine.aborted)
    count = 3 if isinstance(prompt, list) else 1
    with connect(live, {"prompt": prompt, "stream": stream, "max_tokens": 200, "ignore_eos": True}):
        assert wait_until(lambda: len(live.engine.open) == count)
        time.sleep(0.03)
    assert wait_until(lambda: not live.engine.open, 0.5)
    assert len(live.engine.aborted) == aborted + count
    assert all(one.produced < 100 for one in live.engine.aborted[aborted:])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_chat_that_is_left_before_its_first_token_is_aborted(live: Live, stream: bool) -> None:
    live.engine.pace = 30
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    with connect(live, body, "/v1/chat/completions"):
        assert wait_until(lambda: len(live.engine.open) == 1)
    assert wait_until(lambda: not live.engine.open, 0.5)


def test_closing_the_official_clients_stream_aborts(live: Live) -> None:
    live.engine.pace = 0.01
    body = {"ignore_eos": True}
    with live.openai.completions.create(
        model="fake", prompt="x", max_tokens=200, stream=True, extra_body=body
    ) as stream:
        next(iter(stream))
        assert len(live.engine.open) == 1
    assert wait_until(lambda: not live.engine.open, 0.5)


def test_a_client_that_does_not_read_is_cut_off(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(max_model_len=100_000), ServerConfig(port=0, send_timeout=0.2))
    body = {"prompt": "x" * 200, "stream": True, "max_tokens": 90_000, "ignore_eos": True, "n": 2, "logprobs": 5}
    with connect(live, body):
        assert wait_until(lambda: len(live.engine.open) == 1)
        assert wait_until(lambda: not live.engine.open, 8)
    assert live.engine.submitted[0].produced < 180_000


def test_a_complete_answer_aborts_nothing(live: Live) -> None:
    aborted = len(live.engine.aborted)
    for stream in (False, True):
        live.http.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2, "max_tokens": 99, "stream": stream})
    assert len(live.engine.aborted) == aborted


def test_a_failing_prompt_takes_its_siblings_with_it(live: Live) -> None:
    live.engine.fail_after = 2
    assert live.http.post("/v1/completions", json={"prompt": ["a", "b", "c"]}).status_code == 500
    assert wait_until(lambda: not live.engine.open, 0.5)


def test_who_leaves_with_requests_sent_ahead_ends_the_one_that_runs_and_begins_no_other(live: Live) -> None:
    live.engine.pace = 0.01
    submitted = len(live.engine.submitted)
    content = json.dumps({"prompt": "x", "max_tokens": 200, "ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(content)
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall((head + content) * 3)
        assert wait_until(lambda: len(live.engine.open) == 1)
        time.sleep(0.03)
    assert wait_until(lambda: not live.engine.open, 0.5)
    assert live.engine.submitted[-1].aborted
    assert len(live.engine.submitted) == submitted + 1


def test_requests_sent_ahead_are_answered_in_order(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /version HTTP/1.1\r\nhost: x\r\n\r\n")
        received = b""
        while b"version" not in received:
            received += connection.recv(65536)
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert received.index(b'"status"') < received.index(b'"version"')


def test_who_sends_too_many_ahead_is_cut_off(live: Live) -> None:
    live.engine.pace = 30
    content = json.dumps({"prompt": "x"}).encode()
    with connect(live, {"prompt": "x"}) as connection:
        assert wait_until(lambda: len(live.engine.open) == 1)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(content)
        connection.sendall((head + content) * MAX_SENT_AHEAD)
        assert connection.recv(1) == b""
    assert wait_until(lambda: not live.engine.open, 0.5)


@pytest.fixture
def impatient(start: Callable[..., Live]) -> Live:
    return start(FakeEngine(), ServerConfig(port=0, receive_timeout=0.1))


SLOW = {
    "nothing": b"",
    "half of the headers": b"POST /v1/completions HTTP/1.1\r\nhost:",
    "half of the body": b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"prompt": "x',
}


@pytest.mark.parametrize("begun", SLOW)
def test_a_request_that_does_not_come_to_its_end_is_cut_off(impatient: Live, begun: str) -> None:
    host, port = impatient.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(SLOW[begun])
        received = b""
        while piece := connection.recv(65536):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    if begun == "nothing":
        assert received == b""
    else:
        assert head.startswith(b"HTTP/1.1 408 Request Timeout")
        assert json.loads(body)["error"]["type"] == "timeout_error"
    assert not impatient.engine.submitted


def test_letter_by_letter_a_request_gets_no_more_time(impatient: Live) -> None:
    host, port = impatient.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=0.05) as connection:
        received, began = b"", time.monotonic()
        connection.sendall(b"GET /health HTTP/1.1\r\nx-slow: ")
        while not received and time.monotonic() < began + 5:
            connection.sendall(b"a")
            with contextlib.suppress(TimeoutError):
                received = connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 408")


def test_who_takes_longer_to_answer_than_a_client_may_to_ask_is_not_cut_off(impatient: Live) -> None:
    impatient.engine.pace = 0.3
    assert impatient.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
