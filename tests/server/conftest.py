"""A server over real HTTP, in a thread, around a fake engine."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import openai
import pytest

from server import listener
from server.app import create_app
from server.config import ServerConfig
from server.metrics import Metrics
from tests.server.fakes import FakeEngine


@dataclass(frozen=True)
class Live:
    """A running server and clients of it."""

    engine: FakeEngine
    metrics: Metrics
    app: object
    url: str
    http: httpx.Client
    openai: openai.OpenAI


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@contextlib.contextmanager
def running(engine: FakeEngine, config: ServerConfig | None = None, key: str = "none") -> Iterator[Live]:
    config = config or ServerConfig(port=0)
    metrics = Metrics()
    app = create_app(engine, config, metrics)
    ready = threading.Event()
    server = listener.make_server(app, config, ready.set)
    with listener.bind(config) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"

        def serve() -> None:
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(listener.serve(server, sock))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert ready.wait(10)
            with (
                httpx.Client(base_url=url, timeout=10, trust_env=False) as http,
                openai.DefaultHttpxClient(timeout=10, trust_env=False) as transport,
                openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=transport, max_retries=0) as client,
            ):
                yield Live(engine, metrics, app, url, http, client)
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture(scope="session")
def shared() -> Iterator[Live]:
    """One server for all tests that leave it as it was."""
    with running(FakeEngine()) as live:
        yield live


@pytest.fixture
def live(shared: Live) -> Iterator[Live]:
    """The shared server; afterwards it must be idle, alive, and as it was."""
    yield shared
    shared.engine.pace = 0.0
    shared.engine.fail_after = None
    shared.engine.words = None
    shared.engine.healthy = shared.engine.ready = True
    shared.engine.waiting = 0
    shared.engine.default_sampling = {}
    assert not shared.engine.open, "a request is still in the engine"
    assert shared.http.get("/health").status_code == 200


@pytest.fixture
def start() -> Iterator[Callable[..., Live]]:
    """Start a server of one's own."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(running(*args, **kwargs))


@pytest.fixture(scope="module")
def wide() -> Iterator[Live]:
    """A fake engine with room for tools in its prompts."""
    with running(FakeEngine(max_model_len=100_000)) as live:
        yield live
