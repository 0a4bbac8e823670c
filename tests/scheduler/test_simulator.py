"""One simulated replica: times that can be computed by hand, and by the theory of queues."""

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.batching import Batching
from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.simulator import Arrival, Replica, Served

_SECOND = CostModel(base=1.0)
"""Every step takes a second."""


def _config(**limits: Any) -> SchedulerConfig:
    return SchedulerConfig(**{"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, **limits})


def _request(time: float = 0.0, prompt: int = 3, output: int = 1, **more: Any) -> Arrival:
    return Arrival(time=time, prompt=prompt, output=output, **more)


def _live(arrivals: Sequence[Arrival], cost: CostModel = _SECOND, **limits: Any) -> Replica:
    replica = Replica(_config(**limits), cost)
    for serial, arrival in enumerate(arrivals):
        replica.advance(arrival.time)
        replica.submit(arrival, serial)
    replica.advance()
    return replica


def _by_serial(replica: Replica) -> list[Served]:
    return sorted(replica.served, key=lambda served: served.serial)


def test_a_request_alone_takes_the_times_of_its_steps() -> None:
    """10 tokens of prompt in chunks of 4, 4 and 2, then two tokens more: five steps, each counted by hand."""
    cost = CostModel(base=1.0, per_token=0.5, knee=2, per_context_token=0.25, per_pair=0.125, per_sample=8.0)
    replica = _live([_request(time=5.0, prompt=10, output=3)], cost, max_num_batched_tokens=4)
    chunks = [
        1 + 4 * 0.5 + 4 * 0.25 + (1 + 2 + 3 + 4) * 0.125,
        1 + 4 * 0.5 + 8 * 0.25 + (5 + 6 + 7 + 8) * 0.125,
        1 + 2 * 0.5 + 10 * 0.25 + (9 + 10) * 0.125 + 8,
    ]
    decodes = [1 + 2 * 0.5 + 11 * 0.25 + 11 * 0.125 + 8, 1 + 2 * 0.5 + 12 * 0.25 + 12 * 0.125 + 8]
    first = 5 + sum(chunks)
    assert replica.served == [
        Served(0, arrival=5.0, prompt_tokens=10, first=first, last=first + sum(decodes), output_tokens=3)
    ]
    assert (replica.tally.steps, replica.tally.sequences, replica.tally.busy) == (5, 5, sum(chunks + decodes))
    assert replica.tally.peak_blocks == 3
    held = [1, 2, 3, 3, 3]
    filled = [4, 8, 10, 11, 12]
    seconds = chunks + decodes
    assert replica.tally.held_slots == sum(4 * blocks * took for blocks, took in zip(held, seconds, strict=True))
    assert replica.tally.wasted_slots == sum(
        (4 * blocks - tokens) * took for blocks, tokens, took in zip(held, filled, seconds, strict=True)
    )


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 4)), min_size=1, max_size=30))
def test_one_place_serves_as_a_queue_with_one_server(requests: list[tuple[int, int]]) -> None:
    """Waiting times follow Lindley's recursion, W' = max(0, W + S - A), exactly: eighths are exact floats."""
    moments = list(accumulate(gap / 8 for gap, _ in requests))
    services = [float(output) for _, output in requests]
    arrivals = [_request(time, output=output) for time, (_, output) in zip(moments, requests, strict=True)]
    waits = [0.0]
    for index in range(1, len(requests)):
        waits.append(max(0.0, waits[-1] + services[index - 1] - (moments[index] - moments[index - 1])))
    served = _by_serial(_live(arrivals, max_num_seqs=1))
    assert [one.first for one in served] == [m + w + 1 for m, w in zip(moments, waits, strict=True)]
    assert [one.last for one in served] == [m + w + s for m, w, s in zip(moments, waits, services, strict=True)]


def test_who_comes_during_a_step_joins_the_next_and_who_comes_at_its_end_too() -> None:
    replica = _live([_request(0.0, output=4), _request(0.5), _request(2.0), _request(2.25)])
    assert [served.first for served in _by_serial(replica)] == [1.0, 2.0, 3.0, 4.0]
    assert replica.tally.steps == 4


def test_a_replica_rests_between_requests() -> None:
    replica = _live([_request(0.0), _request(10.0)])
    assert [served.first for served in replica.served] == [1.0, 11.0]
    assert (replica.tally.busy, replica.now) == (2.0, 11.0)


def test_advancing_begins_no_step_at_the_moment_when_a_request_is_due() -> None:
    replica = Replica(_config(), _SECOND)
    replica.submit(_request(0.0), 0)
    replica.advance(1.0)
    assert (replica.now, replica.num_open, len(replica.served)) == (1.0, 0, 1)


def test_whoever_is_told_hears_of_each_end() -> None:
    ended: list[Served] = []
    replica = Replica(_config(), _SECOND, ended.append)
    for serial in range(3):
        replica.submit(_request(output=serial + 1), serial)
    replica.advance()
    assert ended == replica.served
    assert [served.serial for served in ended] == [0, 1, 2]


def test_a_request_that_waits_too_long_ends_without_a_token() -> None:
    replica = _live([_request(0.0, output=5), _request(0.5)], max_num_seqs=1, queue_timeout=2.0)
    late = replica.served[0]
    assert (late.serial, late.first, late.last, late.output_tokens) == (1, None, 3.0, 0), "noticed between two steps"
    assert replica.num_open == 0


def test_a_dynamic_batch_begins_when_its_delay_is_over() -> None:
    rule = Batching(mode="dynamic", size=3, delay=0.75)
    served = _by_serial(_live([_request(0.5), _request(1.0), _request(4.0)], batching=rule))
    assert [one.first for one in served] == pytest.approx([2.25, 2.25, 5.75])


def test_a_static_batch_that_never_fills_stays_open() -> None:
    replica = _live([_request(), _request(), _request()], batching=Batching(mode="static", size=2))
    assert (len(replica.served), replica.num_open) == (2, 1)


def test_prompts_share_the_whole_blocks_of_a_prefix_and_nothing_else() -> None:
    arrivals = [
        _request(0.0, prompt=8),
        _request(2.0, prompt=8),
        _request(4.0, prompt=6, prefix=0, prefix_tokens=10),
        _request(6.0, prompt=6, prefix=1, prefix_tokens=10),
        _request(8.0, prompt=6, prefix=0, prefix_tokens=10),
        _request(10.0, prompt=6, prefix=0, prefix_tokens=10, cache_salt="x"),
    ]
    assert [served.cached_tokens for served in _live(arrivals).served] == [0, 0, 0, 0, 8, 0]
    assert [served.prompt_tokens for served in _live(arrivals).served] == [8, 8, 16, 16, 16, 16]
    without = _live(arrivals, prefix_caching=False)
    assert {served.cached_tokens for served in without.served} == {0}


def test_a_prompt_that_quotes_a_recorded_answer_finds_it() -> None:
    first = Arrival(time=0.0, prompt=array("i", [1, 2, 3]), output=array("i", [7, 8, 9, 10, 11, 12]))
    second = Arrival(time=20.0, prompt=array("i", [1, 2, 3, 7, 8, 9, 10, 11, 12, 4]), output=array("i", [5]))
    assert [served.cached_tokens for served in _live([first, second]).served] == [0, 8]


def test_priorities_and_tenants_reach_the_scheduler() -> None:
    request = _request(priority=3, tenant="x").request(0)
    assert (request.priority, request.tenant) == (3, "x")


def test_what_can_never_run_is_refused() -> None:
    with pytest.raises(ValueError, match="may need 300 tokens of KV cache, but the cache holds 256 in all"):
        _live([_request(prompt=200, output=100)])
    with pytest.raises(ValueError, match="at least one token"):
        _live([_request(prompt=0)])


def test_swapping_costs_what_its_tokens_cost() -> None:
    """Two sequences that outgrow the memory: one swaps, and every block that moves is paid for."""
    arrivals = [_request(prompt=8, output=12), _request(prompt=8, output=12)]
    limits = {"num_blocks": 8, "num_host_blocks": 8, "prefix_caching": False}
    free = _live(arrivals, **limits)
    paid = _live(arrivals, CostModel(base=1.0, per_moved_token=0.5), **limits)
    counters = paid.scheduler.counters
    moved = counters.blocks_swapped_out + counters.blocks_swapped_in
    assert moved > 0
    assert paid.tally.busy == free.tally.busy + 0.5 * 4 * moved
    assert [served.output_tokens for served in paid.served] == [12, 12]
