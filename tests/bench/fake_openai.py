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
    sequences_per_step: int = 1
    """What /metrics makes of the tokens."""
    remembers: bool | None = None
    """Whether it has a prefix cache for chats: all but the last message is found there. Where this is set, a prompt is
    as long as its words and the tokens of its answers, and each of those that are computed delays the first token by
    ``per_token``."""
    per_token: float = 0.0
    stall: float = 0.0
    """Seconds for which a prompt of more than 100 token ids keeps everybody waiting."""
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    writes: list[list[float]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    hung_up: int = 0
    """Answers that the client did not wait for."""
    busy_until: float = 0.0

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake-model"}]})

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "1.2.3"})

    async def metrics(self, _: web.Request) -> web.Response:
        tokens = self.tokens_per_chunk * sum(map(len, self.writes))
        steps = tokens / self.sequences_per_step
        label = '{model_name="fake-model"}'
        return web.Response(
            text=f"# HELP octavo:generation_tokens_total Tokens generated.\n"
            f'octavo:iteration_tokens_total_bucket{{le="1"}} 5.0\n'
            f"octavo:iteration_tokens_total_count{label} {steps}\n"
            f"octavo:generation_tokens_total{label} {tokens:.1f}\n"
        )

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
        except (asyncio.CancelledError, ConnectionResetError):
            self.hung_up += 1
            raise
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
        usage = self._usage(body, count)
        if self.stall and len(body.get("prompt", ())) > 100:
            self.busy_until = time.perf_counter() + self.stall
        computed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        first_delay = self.first_delay + self.per_token * computed
        for position in range(count):
            await asyncio.sleep(self.gap if position else first_delay)
            await asyncio.sleep(max(0.0, self.busy_until - time.perf_counter()))
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
            await self._send(response, [], usage=usage)
        await response.write(b"data: [DONE]\n\n")
        return response

    def _usage(self, body: dict[str, Any], count: int) -> dict[str, Any]:
        prompt, cached = 7, self.cached_tokens
        if self.remembers is not None:
            lengths = [
                message["content"].count("né") or len(message["content"].split()) for message in body["messages"]
            ]
            prompt, cached = sum(lengths), sum(lengths[:-1]) if self.remembers and len(lengths) > 2 else 0
        return {
            "prompt_tokens": prompt,
            "completion_tokens": count * self.tokens_per_chunk,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

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
        app.router.add_get("/metrics", server.metrics)
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
