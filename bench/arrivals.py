"""When requests are sent: in a closed loop (a fixed number in flight) or an open one (at random moments of a
given rate).
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass

from bench import flags
from engine.errors import ConfigError

Send = Callable[[int, float | None], Coroutine[None, None, None]]
"""Sends request number ``index``, meant for the moment ``scheduled`` (None in a closed loop); must not raise."""


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """``concurrency`` users, each sending its next request when its last is answered; None: all requests at once."""

    concurrency: int | None

    @property
    def label(self) -> str:
        return f"c={'inf' if self.concurrency is None else self.concurrency}"

    def default_requests(self) -> int:
        """Four rounds, at least 8 requests; 64 when unbounded."""
        return 64 if self.concurrency is None else max(8, 4 * self.concurrency)

    async def drive(self, send: Send, count: int, seed: str) -> None:
        """Send ``count`` requests and wait for them all. ``seed`` is not used: nothing here is random."""
        indices = iter(range(count))

        async def user() -> None:
            for index in indices:
                await send(index, None)

        async with asyncio.TaskGroup() as group:
            for _ in range(count if self.concurrency is None else min(self.concurrency, count)):
                group.create_task(user())


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """``rate`` requests per second on average, whether or not earlier ones are answered.

    Gaps are gamma-distributed with shape ``burstiness``: 1 makes them a Poisson process, below 1 burstier,
    above 1 more even. The gaps' coefficient of variation is 1/sqrt(burstiness).
    """

    rate: float
    burstiness: float = 1.0

    @property
    def label(self) -> str:
        return f"{self.rate:g}/s"

    def default_requests(self) -> int:
        """Half a minute's worth, at least 16 requests."""
        return max(16, math.ceil(30 * self.rate))

    async def drive(self, send: Send, count: int, seed: str) -> None:
        """Send ``count`` requests at the moments that ``seed`` determines, then wait for the stragglers."""
        offsets = arrival_offsets(self.rate, count, seed, self.burstiness)
        begin = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for index, offset in enumerate(offsets):
                due = begin + offset
                if (delay := due - time.perf_counter()) > 0:
                    await asyncio.sleep(delay)
                group.create_task(send(index, due))


Level = ClosedLoop | OpenLoop


def arrival_offsets(rate: float, count: int, seed: str, burstiness: float = 1.0) -> list[float]:
    """Seconds after the start at which each of ``count`` requests is due; the first at 0."""
    return list(itertools.islice(arrival_moments(rate, seed, burstiness), count))


def arrival_moments(rate: float, seed: str, burstiness: float = 1.0) -> Iterator[float]:
    """The same without an end."""
    source = random.Random(seed)
    gaps = (source.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in itertools.count())
    return itertools.accumulate(gaps, initial=0.0)


def parse_concurrency(text: str) -> list[ClosedLoop]:
    """Levels from a list like ``1,8,32,inf``. Raises ConfigError."""
    flag = "--concurrency"
    return [
        ClosedLoop(None if item == "inf" else flags.whole_number(item, flag, others=" or inf"))
        for item in flags.items(text, flag)
    ]


def parse_rate(text: str, burstiness: float) -> list[OpenLoop]:
    """Levels from a list of rates in requests per second like ``0.5,2``. Raises ConfigError."""
    if not burstiness > 0 or math.isinf(burstiness):
        raise ConfigError(f"--burstiness must be a positive number, not {burstiness:g}")
    return [OpenLoop(_positive(item), burstiness) for item in flags.items(text, "--rate")]


def _positive(item: str) -> float:
    try:
        rate = float(item)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"--rate takes positive numbers of requests per second, not {item!r}")
    return rate
