"""A tiny OpenAI-like server with known delays, on a thread of its own, that keeps a log of what it did."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class FakeServer:
    """Its behaviour (set before a run) and its log. Times are ``time.perf_counter()`` seconds, as the client's are."""

    first_delay: float = 0.0
    gap: float = 0.0
    usage: bool = True
    cached_tokens: int = 0
    broken: frozenset[int] = frozenset()
    """Numbers of the generation requests (from 0, warm-ups included) that get an HTTP 500."""
    cut: frozenset[int] = frozenset()
    """Those whose connection is cut after two tokens."""
    refuse_ids: bool = False
    tokens_per_chunk: int = 1
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    writes: list[list[float]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake-model"}]})

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "1.2.3"})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        arrival = time.perf_counter()
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body)
        self.arrivals.append(arrival)
        self.headers.append(dict(request.headers))
        self.writes.append([])
        if number in self.broken:
            return web.json_response(
                {"error": {"message": "it broke", "type": "x", "param": None, "code": None}}, status=500
            )
        if self.refuse_ids and isinstance(body.get("prompt"), list):
            return web.json_response({"detail": "prompt must be a string"}, status=422)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._stream(request, body, number)
        finally:
            self.in_flight -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], number: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat = "messages" in body
        if chat:
            await self._send(
                response, [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
            )
        count = body["max_tokens"] // self.tokens_per_chunk
        for position in range(count):
            await asyncio.sleep(self.gap if position else self.first_delay)
            if number in self.cut and position == 2:
                assert request.transport is not None
                request.transport.close()
                return response
            self.writes[number].append(time.perf_counter())
            text: dict[str, Any] = {"delta": {"content": "né"}} if chat else {"text": "né"}
            await self._send(response, [{"index": 0, **text, "finish_reason": None}])
        end: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        await self._send(response, [{"index": 0, **end, "finish_reason": "length"}])
        if self.usage and body.get("stream_options", {}).get("include_usage"):
            tokens = {"prompt_tokens": 7, "completion_tokens": count * self.tokens_per_chunk}
            await self._send(
                response, [], usage={**tokens, "prompt_tokens_details": {"cached_tokens": self.cached_tokens}}
            )
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response: web.StreamResponse, choices: list[Any], **more: Any) -> None:
        await response.write(b"data: " + json.dumps({"id": "x", "choices": choices, **more}).encode() + b"\n\n")


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """Serve on a free port, in a thread; ``server.url`` is filled in."""
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/v1/models", server.models)
        app.router.add_get("/version", server.version)
        app.router.add_post("/v1/completions", server.generate)
        app.router.add_post("/v1/chat/completions", server.generate)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(timeout=5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
