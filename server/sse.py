"""Server-sent events: a stream's chunks, and the response that writes them.

A chunk is one `json.dumps` of the new text between two halves of a frame made once per stream: at thousands of
tokens per second, building and encoding whole dicts is what would cost.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from json.encoder import encode_basestring_ascii
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, as_api_error, error_body
from server.exchange import Exchange
from server.generation import Generation

DONE = b"data: [DONE]\n\n"
quote = encode_basestring_ascii
"""Text as a JSON string; in ASCII, so that no reader takes an unusual line separator for the end of a line."""


def event(content: object) -> bytes:
    """Any content as one event."""
    return f"data: {json.dumps(content)}\n\n".encode()


def error_event(error: ApiError) -> bytes:
    """An error as one event."""
    return event(error_body(error.status, error.message, param=error.param, code=error.code))


class Frame:
    """The constant part of a stream's chunks: ``head`` has id, object, created and model."""

    def __init__(self, head: Mapping[str, Any], *, include_usage: bool) -> None:
        self._head = head
        self._before = f'data: {json.dumps(head)[:-1]}, "choices": [{{"index": '
        self._after = '}], "usage": null}\n\n' if include_usage else "}]}\n\n"
        self._include_usage = include_usage

    def choice(self, index: int, fields: str, finish_reason: str | None) -> bytes:
        """A chunk of one choice; ``fields`` is JSON without its braces."""
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        return f'{self._before}{index}, {fields}, "finish_reason": {reason}{self._after}'.encode()

    def last(self, usage: Mapping[str, object]) -> bytes:
        """What follows the last choice: the usage if it was asked for, and the end."""
        return event({**self._head, "choices": [], "usage": usage}) + DONE if self._include_usage else DONE


class EventStream(Response):
    """Writes a generation's chunks. The generation is aborted when the client leaves or does not read for long."""

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        generation: Generation,
        send_timeout: float,
        failed: Callable[[ApiError], bytes] = error_event,
    ) -> None:
        """``failed`` writes the event that ends a stream which has failed."""
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._chunks = chunks
        self._generation = generation
        self._send_timeout = send_timeout
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head with the first chunk, then each chunk as it comes.

        Raises:
            ApiError, OctavoError: there was no first chunk; nothing is sent, so the answer can still say why.
        """
        exchange = Exchange.of(scope)
        exchange.generation = self._generation
        async with self._generation.watched(receive), contextlib.aclosing(self._chunks):
            first = await anext(self._chunks)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async with contextlib.aclosing(self._guarded(first, exchange)) as chunks:
                    async for chunk in chunks:
                        async with asyncio.timeout(self._send_timeout):
                            await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except TimeoutError:  # the client has stopped reading: there is nobody to tell
                exchange.error = "send_timeout"

    async def _guarded(self, first: bytes, exchange: Exchange) -> AsyncGenerator[bytes, None]:
        """The chunks; a failure among them becomes the stream's last event."""
        try:
            yield first
            async for chunk in self._chunks:
                yield chunk
        except Exception as error:  # noqa: BLE001 — whatever it is, the client is told and the log has it
            told = as_api_error(error, exchange.request_id)
            exchange.error = told.label
            yield self._failed(told)
