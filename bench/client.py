"""The client: posts one request, reads its stream, and writes down when each chunk came. It raises for nothing."""

import asyncio
import json
import os
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp

from bench.measure import RequestRecord
from bench.sse import SSEParser, Stream, error_message
from engine.errors import ConfigError, OctavoError

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class Server:
    """Where the server is and how to speak to it."""

    base_url: str
    endpoint: str = "completions"
    """A key of ``ENDPOINTS``."""
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    """Seconds that a whole request may take."""

    @property
    def root(self) -> str:
        """The address without a trailing ``/v1``."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def url(self) -> str:
        return self.root + ENDPOINTS[self.endpoint]


class Client:
    """An async context manager around one pool of connections, unlimited in number.

    A connection is kept for 3 seconds of idleness, less than any server in use keeps it (uvicorn: 5), so that
    no request meets a connection that is just being closed.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self._server.api_key}"} if self._server.api_key else {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3),
            timeout=aiohttp.ClientTimeout(total=self._server.timeout),
            headers={**headers, "Content-Type": "application/json"},
            read_bufsize=2**18,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the client is used outside its `async with`")
        return self._session

    async def send(self, body: bytes, record: RequestRecord) -> None:
        """Post ``body`` and fill ``record`` in: times and counts, or the error. Raises only when cancelled."""
        stream = Stream()
        record.start = time.perf_counter()
        await self._post(body, stream)
        _conclude(record, stream)

    async def follow(self, body: bytes, stream: Stream) -> None:
        """Post ``body`` and feed ``stream`` as the events arrive; cancelling this hangs up, which ends the request.

        Raises OctavoError when the answer is an error, breaks off, or carries no token.
        """
        await self._post(body, stream)
        if stream.error is not None:
            raise OctavoError(f"{self._server.url}: {stream.error}")

    async def _post(self, body: bytes, stream: Stream) -> None:
        """Post ``body`` and drain the answer into ``stream``; whatever goes wrong is ``stream.error``."""
        try:
            async with self.session.post(self._server.url, data=body) as response:
                if response.status == 200:
                    await _read(response, stream)
                else:
                    stream.error = f"HTTP {response.status}: {error_message(_parsed(await response.read()))}"
        except TimeoutError:
            stream.error = f"no complete answer within {self._server.timeout:g} s"
        except aiohttp.ClientError as error:
            stream.error = _connection_error(error)
        if stream.error is None and not stream.chunk_times:
            stream.error = "the answer holds no streamed token"
        elif stream.error is None and not (stream.finished or stream.done):
            stream.error = "the stream ended without a finish reason"

    async def page(self, path: str) -> str:
        """The text of a page of the server, such as ``/metrics``. Raises OctavoError when there is none."""
        url = self._server.root + path
        try:
            async with self.session.get(url) as response:
                text = await response.text()
                if response.status != 200:
                    raise OctavoError(f"{url} answered HTTP {response.status}")
                return text
        except (aiohttp.ClientError, TimeoutError) as error:
            raise OctavoError(f"{url}: {_connection_error(error)}") from None

    async def model(self) -> str:
        """The first model that ``/v1/models`` lists. Raises ConfigError when there is none to be had."""
        url = f"{self._server.root}/v1/models"
        try:
            async with self.session.get(url) as response:
                body = _parsed(await response.read())
                if response.status != 200:
                    raise ConfigError(f"{url} answered HTTP {response.status}: {error_message(body)}")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConfigError(f"no server answers at {self._server.root}: {_connection_error(error)}") from None
        try:
            return str(body["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ConfigError(f"{url} lists no model: name it with --model") from None

    async def version(self) -> Any:
        """What ``/version`` says (parsed JSON), or None where there is no such page."""
        try:
            async with self.session.get(f"{self._server.root}/version") as response:
                return _parsed(await response.read()) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None


async def _read(response: aiohttp.ClientResponse, stream: Stream) -> None:
    """Drain the answer into ``stream``. Everything that one read returns arrived at that read's moment."""
    parser = SSEParser()
    async for received in response.content.iter_any():
        now = time.perf_counter()
        for event in parser.feed(received):
            stream.take(event, now)
    now = time.perf_counter()
    for event in parser.close():
        stream.take(event, now)


def _conclude(record: RequestRecord, stream: Stream) -> None:
    record.chunk_times, record.last, record.error = stream.chunk_times, stream.last, stream.error
    if record.error is not None:
        record.last = time.perf_counter()
    usage = stream.usage or {}
    output, prompt = usage.get("completion_tokens"), usage.get("prompt_tokens")
    record.counted_by_server = isinstance(output, int)
    record.output_tokens = output if isinstance(output, int) else len(stream.chunk_times)
    if isinstance(prompt, int):
        record.prompt_tokens = prompt
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    record.cached_tokens = cached if isinstance(cached, int) else 0


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def _connection_error(error: Exception) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno:
        return f"cannot connect: {os.strerror(error.os_error.errno)}"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection broke off in the middle of an answer"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
