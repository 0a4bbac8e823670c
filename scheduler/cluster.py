"""Many replicas behind a router, of which all are simulated, or a sample of those that a reader is told about.

`round-robin`, `random` and `prefix` send a request where they would whatever the replicas do, so each replica lives on
its own: to simulate only some of them is to look at a sample of the cluster, each member of which is exact.
`least-loaded` looks at all replicas for each request; of a large cluster a *cell* is simulated instead, a smaller one
that gets its share of the requests, picked by lot. That is an approximation, on the safe side: the more replicas there
are to choose from, the less often all of them are busy.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import ceil
from random import Random
from typing import Final, Literal, get_args

from scheduler.cost_model import CostModel
from scheduler.scheduler import SchedulerConfig
from scheduler.simulator import Arrival, Ended, Replica, Served

Routing = Literal["round-robin", "least-loaded", "random", "prefix"]
"""In turn; to the replica with the fewest unfinished requests; by lot; those with one prefix to one replica, which is
chosen by lot, and those without a prefix in turn."""
ROUTINGS: Final[tuple[Routing, ...]] = get_args(Routing)

LEAST_SAMPLE: Final = 4
"""Replicas that are simulated at least, where there are as many."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the requests of the replicas that were simulated."""

    replicas: int
    """Of the cluster."""
    sampled: Sequence[Replica]
    """Those of them that were simulated."""
    routing: Routing

    @property
    def served(self) -> list[Served]:
        """Every request that the sample was sent."""
        return [served for replica in self.sampled for served in replica.served]

    @property
    def duration(self) -> float:
        """Seconds until the last replica is idle."""
        return max(replica.now for replica in self.sampled)

    @property
    def utilization(self) -> float:
        """The share of the time that replicas are in a step, 0 to 1."""
        return self._sum(lambda replica: replica.tally.busy) / (self.duration * len(self.sampled) or 1.0)

    @property
    def preemptions(self) -> int:
        """Of the sample."""
        return sum(replica.scheduler.counters.preemptions for replica in self.sampled)

    @property
    def steps(self) -> int:
        """Of the sample."""
        return sum(replica.tally.steps for replica in self.sampled)

    @property
    def peak_kv(self) -> float:
        """The largest share of its KV blocks that any replica used, 0 to 1."""
        return max(replica.tally.peak_blocks / replica.scheduler.pool.num_blocks for replica in self.sampled)

    @property
    def kv_waste(self) -> float:
        """The share of the blocks in use that holds nothing yet, over time, 0 to 1."""
        held = self._sum(lambda replica: replica.tally.held_slots)
        return self._sum(lambda replica: replica.tally.wasted_slots) / (held or 1.0)

    @property
    def note(self) -> str:
        """What of this is exact."""
        simulated = len(self.sampled)
        if simulated == self.replicas:
            return f"all {simulated} replicas were simulated" if simulated > 1 else "the replica was simulated"
        if self.routing == "least-loaded":
            return (
                f"approximate: {self.replicas} replicas were simulated as a cell of {simulated} with "
                f"{simulated}/{self.replicas} of the requests, which waits a little more than the whole would"
            )
        return f"a sample: {simulated} of {self.replicas} replicas were simulated, each with the requests it would get"

    def _sum(self, value: Callable[[Replica], float]) -> float:
        return sum(map(value, self.sampled))


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal replicas, and who gets which request."""

    replicas: int
    config: SchedulerConfig
    cost: CostModel
    routing: Routing = "round-robin"
    sample: int | None = None
    """Simulate no more replicas than it takes to serve so many requests; None: simulate all."""
    seed: str = ""

    def simulate(self, arrivals: Sequence[Arrival], ended: Ended | None = None) -> Outcome:
        """Serve requests, which come in order of time; ``ended`` is told of each when it has ended, and may raise.

        Raises ValueError if a request can never run.
        """
        make = partial(Replica, self.config, self.cost, ended)
        replicas = self._cell(arrivals, make) if self.routing == "least-loaded" else self._apart(arrivals, make)
        return Outcome(self.replicas, replicas, self.routing)

    def shares(self, arrivals: Sequence[Arrival]) -> list[Sequence[int]]:
        """Which requests each replica of the sample gets, by index: replicas 0, 1, 2 … until there are enough."""
        chosen: list[Sequence[int]] = []
        total = 0
        for indices in self._in_turn(len(arrivals)) if self.routing == "round-robin" else self._by_route(arrivals):
            if self.sample is not None and total >= self.sample and len(chosen) >= LEAST_SAMPLE:
                break
            chosen.append(indices)
            total += len(indices)
        return chosen

    def _apart(self, arrivals: Sequence[Arrival], make: Callable[[], Replica]) -> list[Replica]:
        """Simulate each replica of the sample from beginning to end."""
        replicas = []
        for indices in self.shares(arrivals):
            replica = make()
            for index in indices:
                arrival = arrivals[index]
                replica.advance(arrival.time)
                replica.submit(arrival, index)
            replica.advance()
            replicas.append(replica)
        return replicas

    def _cell(self, arrivals: Sequence[Arrival], make: Callable[[], Replica]) -> list[Replica]:
        """Simulate replicas side by side, since each request looks at all of them."""
        size = self.replicas
        if self.sample is not None and arrivals:
            size = min(size, max(LEAST_SAMPLE, ceil(self.sample * size / len(arrivals))))
        lots = Random(f"{self.seed}/cell")
        replicas = [make() for _ in range(size)]
        for index in range(len(arrivals)):
            if size < self.replicas and lots.random() * self.replicas >= size:
                continue  # it is for the part of the cluster that is not simulated
            arrival = arrivals[index]
            for replica in replicas:
                replica.advance(arrival.time)
            min(replicas, key=_num_open).submit(arrival, index)
        for replica in replicas:
            replica.advance()
        return replicas

    def _in_turn(self, total: int) -> Iterable[Sequence[int]]:
        return (range(first, total, self.replicas) for first in range(self.replicas))

    def _by_route(self, arrivals: Sequence[Arrival]) -> Iterable[Sequence[int]]:
        """Which requests each replica gets, where chance decides."""
        source = Random(f"{self.seed}/routes")
        indices: list[array[int]] = [array("l") for _ in range(self.replicas)]
        if self.routing == "random":
            for index in range(len(arrivals)):
                indices[int(source.random() * self.replicas)].append(index)
            return indices
        homes: dict[int, int] = {}
        turn = count()
        for index, prefix in enumerate(arrival.prefix for arrival in arrivals):
            if prefix is None:
                indices[next(turn) % self.replicas].append(index)
                continue
            if prefix not in homes:
                homes[prefix] = int(source.random() * self.replicas)
            indices[homes[prefix]].append(index)
        return indices


def _num_open(replica: Replica) -> int:
    return replica.num_open
