"""How a server ends: in order on a signal, and with a failure when its engine has failed."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from engine.errors import ConfigError
from server import listener
from server.app import create_app
from server.config import ServerConfig
from tests.server.fakes import FakeEngine

SCRIPT = """
import asyncio, logging
from server import listener
from server.app import create_app
from server.config import ServerConfig
from tests.server.fakes import FakeEngine

logging.basicConfig(level=logging.CRITICAL)
config = ServerConfig(port=0, drain_timeout=DRAIN)
app = create_app(FakeEngine(pace=0.02), config)
with listener.bind(config) as sock:
    ready = lambda: print(sock.getsockname()[1], flush=True)
    server = listener.make_server(app, config, ready)
    raise SystemExit(asyncio.run(listener.serve(server, sock)))
"""


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own; it prints its port when it is ready."""
    script = SCRIPT.replace("DRAIN", str(request.param))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def answer_until_signal(process: subprocess.Popen[str], tokens: int, *, stream: bool = True) -> str:
    """Ask for an answer, send SIGTERM while it is made, and return all that comes."""
    assert process.stdout is not None
    port = int(process.stdout.readline())
    body = json.dumps({"prompt": "x", "stream": stream, "max_tokens": tokens, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        received = b""
        if stream:
            received += connection.recv(4096)
        else:
            time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        while piece := connection.recv(65536):
            received += piece
    return received.decode()


@pytest.mark.parametrize("process", [30], indirect=True)
def test_on_sigterm_running_requests_finish_and_the_process_ends_with_0(process: subprocess.Popen[str]) -> None:
    received = answer_until_signal(process, tokens=25)
    assert received.count('"text"') == 25
    assert "[DONE]" in received
    assert process.wait(5) == 0


@pytest.mark.parametrize("process", [0], indirect=True)
def test_after_the_drain_timeout_a_stream_ends_with_an_error(process: subprocess.Popen[str]) -> None:
    received = answer_until_signal(process, tokens=200)
    assert "[DONE]" not in received
    last = received[received.rindex("data: ") :].removeprefix("data: ").partition("\n")[0]
    assert json.loads(last)["error"]["code"] == "aborted"
    assert received.endswith("0\r\n\r\n"), "the response is complete"
    assert process.wait(5) == 0


@pytest.mark.parametrize("process", [0], indirect=True)
def test_after_the_drain_timeout_a_whole_answer_is_a_503(process: subprocess.Popen[str]) -> None:
    head, _, body = answer_until_signal(process, tokens=200, stream=False).partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 503")
    assert json.loads(body)["error"]["type"] == "service_unavailable_error"
    assert process.wait(5) == 0


def test_a_port_is_taken_from_the_moment_it_is_bound() -> None:
    with listener.bind(ServerConfig(port=0)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: Address already in use"):
            listener.bind(ServerConfig(port=port))


def test_a_failed_engine_ends_the_server_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_WATCH_PERIOD", 0.0)
    engine = FakeEngine()
    config = ServerConfig(port=0)

    def fail() -> None:
        engine.healthy = False

    with listener.bind(config) as sock:
        server = listener.make_server(create_app(engine, config), config, fail)
        assert asyncio.run(listener.serve(server, sock)) == 1
