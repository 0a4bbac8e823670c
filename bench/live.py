"""An answer that can be watched while it comes, where `Client.send` tells of it only when it has ended."""

import time

import aiohttp

from bench.client import Client, Server
from bench.sse import SSEParser, Stream, error_message
from engine.errors import OctavoError


async def follow(client: Client, server: Server, body: bytes, stream: Stream) -> None:
    """Post ``body`` and feed ``stream`` as the events arrive; cancelling this hangs up, which ends the request.

    Raises OctavoError when the answer is an error, breaks off, or carries no token.
    """
    parser = SSEParser()
    try:
        async with client.session.post(server.url, data=body) as response:
            if response.status != 200:
                told = " ".join((await response.text()).split())[:300]
                raise OctavoError(f"{server.url} answered HTTP {response.status}: {told}")
            async for received in response.content.iter_any():
                now = time.perf_counter()
                for event in parser.feed(received):
                    stream.take(event, now)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise OctavoError(f"{server.url} broke off: {type(error).__name__} {error_message(str(error))}") from None
    if stream.error is not None:
        raise OctavoError(f"{server.url} failed {stream.error}")
    if not stream.chunk_times:
        raise OctavoError(f"{server.url} answered without a token")
