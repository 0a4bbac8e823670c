"""A client that leaves, or does not read, costs nothing from that moment on."""

import json
import socket
import time
from collections.abc import Callable

import pytest

from server.config import ServerConfig
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
