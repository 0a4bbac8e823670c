"""uvicorn, with what it leaves open closed: the size of headers, and the end of the process."""

import asyncio
import json
import logging
import math
import socket
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from engine.errors import ConfigError
from server.config import ServerConfig
from server.errors import error_body
from server.exchange import new_request_id
from server.logs import about
from server.serving import Serving

logger = logging.getLogger("octavo.server")

MAX_HEADER_SIZE = 64 * 1024
"""Bytes of a request's line and headers, at most: the parser itself takes 20 MB and more."""

MAX_SENT_AHEAD = 16
"""Requests of a connection that have no answer yet, at most: each further one would take memory for nothing."""

_WATCH_PERIOD = 1.0
_WATCH_PATIENCE = 2
"""Failed looks at the engine's health, a period apart, until the server gives up."""

LAST_WORDS = 2
"""Seconds, past the drain timeout, in which stopped requests are told so before their tasks are cancelled."""


class Http(HttpToolsProtocol):
    """HTTP/1.1 with limits: on the size of headers, on the time in which a request comes, on requests sent ahead.

    What is malformed is refused in OpenAI's shape. Once a client is gone, all its requests are told, those too that
    wait behind another one of the same connection; uvicorn tells the last one only.
    """

    def __init__(self, *args: Any, receive_timeout: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receive_timeout = receive_timeout
        self._too_late: asyncio.TimerHandle | None = None
        self._unfinished = 0  # bytes received since the headers began, while they are incomplete
        self._unanswered: deque[RequestResponseCycle] = deque()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there, and has to say something."""
        super().connection_made(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._expect_nothing()
        super().connection_lost(exc)
        self._give_up()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._unfinished = 1
        self._expect_request()

    def on_headers_complete(self) -> None:
        """Its headers are complete."""
        self._unfinished = 0
        super().on_headers_complete()
        self._unanswered.append(self.cycle)
        if len(self._unanswered) > MAX_SENT_AHEAD:
            self._hang_up()
        elif self.pipeline:
            self.flow.resume_reading()  # only who reads hears that the client has left

    def on_message_complete(self) -> None:
        """All of it is there."""
        self._expect_nothing()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The oldest request has its answer."""
        self._unanswered.popleft()
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes came in."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._unfinished:
            self._unfinished += len(data)
            if self._unfinished > MAX_HEADER_SIZE and not self.transport.is_closing():
                self.send_400_response(f"The request's headers are larger than {MAX_HEADER_SIZE} bytes.")

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not even HTTP, and hang up."""
        self._refuse(400, msg)

    def _expect_request(self) -> None:
        """A whole request must come in time from now on."""
        self._expect_nothing()
        self._too_late = self.loop.call_later(self._receive_timeout, self._on_too_late)

    def _expect_nothing(self) -> None:
        if self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None

    def _on_too_late(self) -> None:
        begun = self._unfinished or (self._unanswered and not self._unanswered[-1].response_started)
        if begun:
            self._refuse(408, f"The request was not complete within {self._receive_timeout:g} seconds.")
        else:  # nobody waits for an answer: nothing came at all, or it was refused before it was complete
            self._hang_up()

    def _refuse(self, status: int, msg: str) -> None:
        """The last words on this connection."""
        if self.transport.is_closing():
            return
        request_id = new_request_id()
        logger.debug("HTTP %d: %s", status, msg, extra=about(request_id))
        body = json.dumps(error_body(status, msg)).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self._hang_up()

    def _hang_up(self) -> None:
        self._expect_nothing()
        self.transport.close()
        self._give_up()

    def _give_up(self) -> None:
        """Nobody waits for any answer any more."""
        self.pipeline.clear()
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        self._unanswered.clear()


class Server(uvicorn.Server):
    """Says when it is ready, turns not ready on the first signal, and stops when the engine has failed."""

    def __init__(self, config: uvicorn.Config, serving: Serving, on_ready: Callable[[], None]) -> None:
        """``config`` must leave requests a little more time than the drain timeout; see ``make_server``."""
        super().__init__(config)
        self.engine_failed = False
        self.serving = serving
        self._on_ready = on_ready
        self._failures = 0
        self._last_look = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and tell."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Look after the engine; called ten times a second. True ends the server."""
        now = time.monotonic()
        if now - self._last_look >= _WATCH_PERIOD:
            self._last_look = now
            self._failures = 0 if self.serving.engine.is_healthy() else self._failures + 1
            self.engine_failed = self._failures >= _WATCH_PATIENCE
        return self.engine_failed or await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests finish; past the drain timeout the engine stops, and each is told so."""
        deadline = asyncio.create_task(self._stop_engine_in_time())
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()

    async def _stop_engine_in_time(self) -> None:
        await asyncio.sleep(self.serving.config.drain_timeout)
        await self.serving.engine.stop()

    def handle_exit(self, sig: int, frame: object) -> None:
        """The first signal: no new work."""
        self.serving.lifecycle.draining = True
        super().handle_exit(sig, frame)  # type: ignore[arg-type]

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn does, but a signal that was answered by a clean stop does not kill the process after it."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def bind(config: ServerConfig) -> socket.socket:
    """Take the address, before the model is loaded: a taken port is known at once.

    Raises:
        ConfigError: it cannot be had.
    """
    last: OSError | None = None
    with suppress(socket.gaierror):
        for family, kind, proto, _, address in socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            sock = socket.socket(family, kind, proto)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(address)
                # Two sockets can be bound to one port while neither listens: only this tells that it is taken.
                sock.listen()
            except OSError as error:
                sock.close()
                last = error
            else:
                return sock
    reason = last.strerror if last else "no such address"
    raise ConfigError(f"cannot listen on {config.host} port {config.port}: {reason}")


async def serve(server: Server, sock: socket.socket) -> int:
    """Serve until a signal or the engine's failure, with the engine running; returns the exit code."""
    engine = server.serving.engine
    await engine.start()
    try:
        await server.serve(sockets=[sock])
    finally:
        await engine.stop()
    return 1 if server.engine_failed or not server.started else 0


def make_server(app: FastAPI, config: ServerConfig, on_ready: Callable[[], None]) -> Server:
    """The server, not yet running."""
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        loop="uvloop",
        http=cast(type[asyncio.Protocol], partial(Http, receive_timeout=config.receive_timeout)),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=65,
        timeout_graceful_shutdown=math.ceil(config.drain_timeout) + LAST_WORDS,
    )
    return Server(settings, app.state.serving, on_ready)
