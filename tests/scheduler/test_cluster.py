"""Simulated clusters: who gets which request, and that a sample is what it says it is."""

from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.cluster import ROUTINGS, Cluster, Outcome, Routing, UnservableError
from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.simulator import Arrival

_COST = CostModel(base=0.5, per_token=0.01)
_CONFIG = SchedulerConfig(num_blocks=32, block_size=4, max_num_seqs=3)


def _load(count: int, rate: float = 2.0, prefixes: int = 5) -> list[Arrival]:
    source = Random(count)
    moments = accumulate(source.expovariate(rate) for _ in range(count))
    return [
        Arrival(
            time=moment,
            prompt=source.randint(1, 12),
            output=source.randint(1, 6),
            prefix=source.choice([None, *range(prefixes)]),
            prefix_tokens=8,
        )
        for moment in moments
    ]


def _cluster(replicas: int, routing: Routing = "round-robin", **more: Any) -> Cluster:
    return Cluster(replicas, _CONFIG, _COST, routing, seed="s", **more)


def _serials(outcome: Outcome) -> list[list[int]]:
    return [sorted(served.serial for served in life.served) for life in outcome.lives]


@given(st.sampled_from(ROUTINGS), st.integers(1, 6), st.integers(0, 40))
def test_each_request_ends_exactly_once(routing: Routing, replicas: int, count: int) -> None:
    load = _load(count)
    outcome = _cluster(replicas, routing).simulate(load)
    assert sorted(serial for serials in _serials(outcome) for serial in serials) == list(range(count))
    assert (outcome.sent, outcome.total, outcome.unserved, outcome.cut) == (count, count, 0, False)
    for served in outcome.served:
        assert served.output_tokens == load[served.serial].output
        assert served.first is not None
        assert served.arrival < served.first <= served.last


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_same_cluster_does_the_same_again(routing: Routing) -> None:
    first, second = (_cluster(4, routing, sample=10).simulate(_load(60)) for _ in range(2))
    assert first.served == second.served
    assert first.utilization == second.utilization


@pytest.mark.parametrize("routing", ["round-robin", "random", "prefix"])
def test_a_sampled_replica_does_what_it_does_in_the_whole_cluster(routing: Routing) -> None:
    load = _load(300, rate=30.0, prefixes=60)
    whole = _cluster(40, routing).simulate(load)
    sample = _cluster(40, routing, sample=20).simulate(load)
    assert 2 <= len(sample.lives) < len(whole.lives) == 40
    for alone, among in zip(sample.lives, whole.lives[: len(sample.lives)], strict=True):
        assert alone.served == among.served
        assert alone.tally == among.tally
    assert sample.sent == len(sample.served)
    assert "a sample: " in sample.note
    assert "every replica" in whole.note


def test_a_cell_of_a_least_loaded_cluster_gets_its_share_and_says_that_it_is_approximate() -> None:
    outcome = _cluster(40, "least-loaded", sample=60).simulate(_load(600, rate=40.0))
    assert len(outcome.lives) == 8
    assert 80 < outcome.sent < 160, "8 of 40 replicas are sent about a fifth"
    assert outcome.sent == len(outcome.served)
    assert "approximate: 40 replicas were simulated as a cell of 8" in outcome.note


def test_so_many_replicas_are_simulated_as_the_sample_takes() -> None:
    load = _load(200)
    assert [len(_cluster(50, sample=size).shares(load, 200)) for size in (1, 40, 100, 10_000)] == [2, 10, 25, 50]
    assert len(_cluster(50, "prefix", sample=1).shares(load, 200)) == 16, "replicas that differ need a larger sample"
    assert len(_cluster(1, sample=1).shares(load, 200)) == 1


def test_no_more_requests_of_a_replica_are_looked_at_than_it_is_told() -> None:
    outcome = _cluster(3, most_each=4).simulate(_load(50))
    assert (outcome.total, outcome.sent, outcome.cut) == (12, 12, True)
    assert _serials(outcome) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_round_robin_takes_turns() -> None:
    assert _serials(_cluster(3).simulate(_load(8))) == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_random_routes_reach_every_replica_and_depend_on_the_seed() -> None:
    load = _load(60)
    shares = _cluster(3, "random").shares(load, 60)
    assert sorted(index for indices in shares for index in indices) == list(range(60))
    assert min(map(len, shares)) > 8
    assert shares != Cluster(3, _CONFIG, _COST, "random", seed="t").shares(load, 60)


def test_a_prefix_has_one_home_and_requests_without_one_take_turns() -> None:
    load = _load(100, prefixes=12)
    shares = _cluster(4, "prefix").shares(load, 100)
    homes: dict[int, set[int]] = {}
    for home, indices in enumerate(shares):
        for index in indices:
            prefix = load[index].prefix
            if prefix is not None:
                homes.setdefault(prefix, set()).add(home)
    assert {len(replicas) for replicas in homes.values()} == {1}
    assert len(set.union(*homes.values())) > 1
    loose = [sum(load[index].prefix is None for index in indices) for indices in shares]
    assert max(loose) - min(loose) <= 1


def test_least_loaded_avoids_the_busy() -> None:
    def request(time: float, output: int) -> Arrival:
        return Arrival(time=time, prompt=1, output=output)

    load = [request(0.0, 50), request(0.1, 1), request(5.0, 1), request(10.0, 1)]
    assert _serials(_cluster(2, "least-loaded").simulate(load)) == [[0], [1, 2, 3]]


def test_prefix_routing_finds_more_in_the_caches() -> None:
    load = _load(200, rate=4.0, prefixes=40)
    together, apart = (_cluster(8, routing).simulate(load) for routing in ("prefix", "round-robin"))
    assert together.prefix_hits > apart.prefix_hits > 0


def test_more_replicas_are_never_slower_under_a_plain_load() -> None:
    load = [Arrival(time=index / 4, prompt=4, output=4) for index in range(80)]

    def late(replicas: int) -> int:
        served = _cluster(replicas).simulate(load).served
        return sum(one.last - one.arrival > 3 for one in served)

    misses = [late(replicas) for replicas in range(1, 7)]
    assert misses == sorted(misses, reverse=True)
    assert misses[0] > 60
    assert misses[-1] == 0


def test_the_figures_of_an_outcome_are_those_of_its_replicas() -> None:
    load: Sequence[Arrival] = [Arrival(time=0.0, prompt=6, output=1), Arrival(time=0.0, prompt=2, output=3)]
    outcome = Cluster(2, _CONFIG, CostModel(base=1.0)).simulate(load)
    assert outcome.duration == 3.0
    assert outcome.utilization == (1 + 3) / (2 * 3)
    assert outcome.occupancy == 1.0
    assert outcome.peak_kv == 2 / 32
    # Replica 0 holds 2 blocks for 1 s, with 6 of 8 slots in use; replica 1 holds 1 for 3 s, with 2, 3 and 4 of 4.
    assert outcome.kv_waste == (2 + 2 + 1 + 0) / (8 + 4 + 4 + 4)
    assert outcome.preemptions == 0


def test_a_request_that_can_never_run_is_named() -> None:
    load = [Arrival(time=0.0, prompt=4, output=4), Arrival(time=1.0, prompt=1000, output=4)]
    for routing in ROUTINGS:
        with pytest.raises(UnservableError, match="request 1 can never run: the request may need 1004 tokens"):
            _cluster(1, routing).simulate(load)
