"""A long prompt that arrives while other answers are streaming, and every moment at which those got a token."""

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.client import Client, Server
from bench.driving import bodies, warm_up
from bench.progress import progress
from bench.prompts import Prompt
from bench.sse import Stream
from engine.errors import OctavoError

SETTLED = 5
"""Tokens after which a stream counts as decoding."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Two consecutive chunks of one stream: when the second came, and how long after the first, in seconds."""

    end: float
    length: float


@dataclass(frozen=True, slots=True)
class Intrusion:
    """What happened, in seconds of ``time.perf_counter()``."""

    streams: Sequence[Sequence[float]]
    """Arrival of every chunk, by stream."""
    sent: float
    """When the long prompt was sent, and"""
    answered: float
    """when its first token came."""

    @property
    def ttft(self) -> float:
        """The long prompt's time to first token, seconds."""
        return self.answered - self.sent

    def gaps(self, begin: float, end: float) -> Iterator[Gap]:
        """The gaps, of all streams, whose middle lies between two moments."""
        for times in self.streams:
            for earlier, later in itertools.pairwise(times):
                if begin <= (earlier + later) / 2 < end:
                    yield Gap(later, later - earlier)


async def intrude_all(
    server: Server, running: Sequence[Prompt], prompts: Sequence[Prompt], *, quiet: float, label: str
) -> list[Intrusion]:
    """Let the ``prompts`` arrive one after the other, each at streams of its own; the first is a warm-up.

    Raises OctavoError when a request fails.
    """
    found = []
    async with Client(server) as client:
        model = await client.model()
        await warm_up(client, prompts[:1], model)
        with progress(label, len(prompts) - 1, "prompt") as bar:
            for prompt in prompts[1:]:
                found.append(await _intrude(client, model, running, prompt, quiet))
                bar.update()
    return found


async def _intrude(client: Client, model: str, running: Sequence[Prompt], long: Prompt, quiet: float) -> Intrusion:
    """Start the streams, wait ``quiet`` seconds, send the long prompt; half as long after its answer hang up on all.

    Raises OctavoError when a request fails, or a stream ends before it should have been stalled.
    """
    streams = [Stream() for _ in running]
    tasks = [
        asyncio.create_task(client.follow(body, stream))
        for body, stream in zip(bodies(running, model), streams, strict=True)
    ]
    try:
        while any(len(stream.chunk_times) < SETTLED for stream in streams):
            _check(tasks)
            await asyncio.sleep(0.005)
        await asyncio.sleep(quiet)
        body, answer = bodies([long], model)[0], Stream()
        sent = time.perf_counter()
        await client.follow(body, answer)
        _check(tasks)
        await asyncio.sleep(quiet / 2)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Intrusion([stream.chunk_times for stream in streams], sent, answer.chunk_times[0])


def _check(tasks: Sequence["asyncio.Task[None]"]) -> None:
    """Raise OctavoError if a stream has ended: it cannot be stalled any more."""
    for task in tasks:
        if task.done():
            task.result()
            raise OctavoError("a stream ended before the long prompt was answered: raise --stream-len")
