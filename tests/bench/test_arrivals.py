import asyncio
import itertools
import math
import statistics
import time

import pytest

from bench.arrivals import ClosedLoop, OpenLoop, arrival_offsets, parse_concurrency, parse_rate
from engine.errors import ConfigError


def gaps(rate: float, burstiness: float = 1.0) -> list[float]:
    return [b - a for a, b in itertools.pairwise(arrival_offsets(rate, 20_000, "seed", burstiness))]


def test_poisson_gaps_have_the_mean_deviation_and_tail_of_an_exponential() -> None:
    measured = gaps(rate=4.0)
    assert statistics.fmean(measured) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(measured) == pytest.approx(0.25, rel=0.03)
    assert sum(gap > 0.5 for gap in measured) / len(measured) == pytest.approx(math.exp(-2), rel=0.05)


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_burstiness_changes_the_spread_of_gaps_but_not_their_mean(burstiness: float) -> None:
    measured = gaps(10.0, burstiness)
    assert statistics.fmean(measured) == pytest.approx(0.1, rel=0.05)
    assert statistics.stdev(measured) / statistics.fmean(measured) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_arrivals_begin_at_once_and_depend_on_the_seed_alone() -> None:
    offsets = arrival_offsets(2.0, 50, "a")
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert len(offsets) == 50
    assert offsets == arrival_offsets(2.0, 50, "a")
    assert offsets != arrival_offsets(2.0, 50, "b")


@pytest.mark.parametrize(("concurrency", "expected"), [(1, 1), (3, 3), (50, 12), (None, 12)])
async def test_a_closed_loop_fills_its_bound_and_never_exceeds_it(concurrency: int | None, expected: int) -> None:
    running, most, sent = 0, 0, []

    async def send(index: int, scheduled: float | None) -> None:
        nonlocal running, most
        assert scheduled is None
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * (index % 3))
        sent.append(index)
        running -= 1

    await ClosedLoop(concurrency).drive(send, 12, "")
    assert most == expected
    assert sorted(sent) == list(range(12))


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    never = asyncio.Event()
    started: list[float] = []

    async def send(index: int, scheduled: float | None) -> None:
        started.append(time.perf_counter())
        if len(started) == 10:
            never.set()
        await never.wait()  # no request ends before the last one is sent

    await asyncio.wait_for(OpenLoop(1000.0).drive(send, 10, "seed"), timeout=5)
    assert len(started) == 10


async def test_an_open_loop_sends_when_the_schedule_says() -> None:
    lateness: list[float] = []

    async def send(index: int, scheduled: float | None) -> None:
        assert scheduled is not None
        lateness.append(time.perf_counter() - scheduled)

    await OpenLoop(200.0).drive(send, 20, "seed")
    assert min(lateness) >= 0
    assert statistics.median(lateness) < 0.02


def test_levels_are_parsed_labelled_and_sized() -> None:
    levels = parse_concurrency("1, 8,inf")
    assert [level.label for level in levels] == ["c=1", "c=8", "c=inf"]
    assert [level.default_requests() for level in levels] == [8, 32, 64]
    (slow, fast) = parse_rate("0.5,4", burstiness=1.0)
    assert (slow.label, fast.label) == ("0.5/s", "4/s")
    assert (slow.default_requests(), fast.default_requests()) == (16, 120)


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1.5", "8,8", "²"])
def test_a_bad_concurrency_is_one_clear_error(text: str) -> None:
    with pytest.raises(ConfigError, match="--concurrency"):
        parse_concurrency(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "x"])
def test_a_bad_rate_is_one_clear_error(text: str) -> None:
    with pytest.raises(ConfigError, match="--rate"):
        parse_rate(text, 1.0)


@pytest.mark.parametrize("burstiness", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_burstiness_is_one_clear_error(burstiness: float) -> None:
    with pytest.raises(ConfigError, match="--burstiness"):
        parse_rate("1", burstiness)
