"""Many replicas behind a router, of which all are simulated, or a sample of those that a reader is told about.

`round-robin`, `random` and `prefix` send a request where they would whatever the replicas do, so each replica lives on
its own: to simulate only some of them is to look at a sample of the cluster, each member of which is exact.
`least-loaded` looks at all replicas for each request; of a large cluster a *cell* is simulated instead, a smaller one
that gets its share of the requests, picked by lot. That is an approximation, on the safe side: the more replicas there
are to choose from, the less often all of them are busy.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import ceil
from random import Random
from typing import Final, Literal, Protocol, get_args

from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.simulator import Arrival, Ended, Life, Replica, Served

Routing = Literal["round-robin", "least-loaded", "random", "prefix"]
"""In turn; to the replica with the fewest unfinished requests; by lot; those with one prefix to one replica, which is
chosen by lot, and those without a prefix in turn."""
ROUTINGS: Final[tuple[Routing, ...]] = get_args(Routing)

_LEAST: Final[Mapping[Routing, int]] = {"round-robin": 2, "random": 2, "prefix": 16, "least-loaded": 8}
"""Replicas that are simulated at least, where there are as many: the more unequal they are, the more."""


class Load(Protocol):
    """Requests in order of time. They may be made up when they are asked for, as long as they are always the same."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Arrival: ...


class UnservableError(ValueError):
    """A request that no replica can ever run, for the reason that is given."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal replicas, and who gets which request."""

    replicas: int
    config: SchedulerConfig
    cost: CostModel
    routing: Routing = "round-robin"
    sample: int | None = None
    """Simulate about as many replicas as it takes to serve so many requests; None: all."""
    most_each: int | None = None
    """Look at no more requests than so many per replica, the first ones: what comes too fast only queues up."""
    seed: str = ""

    def simulate(self, load: Load, ended: Ended | None = None) -> Outcome:
        """Serve a load; ``ended`` is told of each request when it has ended. Raises UnservableError."""
        total = self.considered(load)
        make = partial(Replica, self.config, self.cost, ended)
        serve = self._cell if self.routing == "least-loaded" else self._apart
        lives, sent = serve(load, total, make)
        return Outcome(self, lives, sent, total, total < len(load))

    def considered(self, load: Load) -> int:
        """The requests of a load that are looked at: so many, from the first."""
        return len(load) if self.most_each is None else min(len(load), self.most_each * self.replicas)

    def simulated(self, total: int) -> int:
        """How many replicas are simulated of those that get ``total`` requests."""
        if self.sample is None:
            return self.replicas
        return min(self.replicas, max(_LEAST[self.routing], ceil(self.sample * self.replicas / max(total, 1))))

    def shares(self, load: Load, total: int) -> Sequence[Sequence[int]]:
        """Which of the first ``total`` requests the replicas of the sample get, by index; not for `least-loaded`."""
        simulated = self.simulated(total)
        if self.routing == "round-robin":
            return [range(first, total, self.replicas) for first in range(simulated)]
        shares: list[array[int]] = [array("l") for _ in range(simulated)]
        for index, replica in enumerate(self._homes(load, total)):
            if replica < simulated:
                shares[replica].append(index)
        return shares

    def _homes(self, load: Load, total: int) -> Iterator[int]:
        """The replica of each request, where chance decides."""
        source = Random(f"{self.seed}/routes")
        if self.routing == "random":
            yield from (int(source.random() * self.replicas) for _ in range(total))
            return
        homes: dict[int, int] = {}
        turn = count()
        for index in range(total):
            prefix = load[index].prefix
            if prefix is None:
                yield next(turn) % self.replicas
                continue
            if prefix not in homes:
                homes[prefix] = int(source.random() * self.replicas)
            yield homes[prefix]

    def _apart(self, load: Load, total: int, make: Callable[[], Replica]) -> tuple[list[Life], int]:
        """Simulate each replica of the sample from beginning to end."""
        lives = []
        shares = self.shares(load, total)
        for indices in shares:
            replica = make()
            for index in indices:
                arrival = load[index]
                replica.advance(arrival.time)
                _submit(replica, arrival, index)
            replica.advance()
            lives.append(replica.life)
        return lives, sum(map(len, shares))

    def _cell(self, load: Load, total: int, make: Callable[[], Replica]) -> tuple[list[Life], int]:
        """Simulate replicas side by side, since each request looks at all of them."""
        lots, sent = Random(f"{self.seed}/cell"), 0
        replicas = [make() for _ in range(self.simulated(total))]
        for index in range(total):
            if len(replicas) < self.replicas and lots.random() * self.replicas >= len(replicas):
                continue  # it is for the part of the cluster that is not simulated
            arrival = load[index]
            for replica in replicas:
                replica.advance(arrival.time)
            _submit(min(replicas, key=_num_open), arrival, index)
            sent += 1
        for replica in replicas:
            replica.advance()
        return [replica.life for replica in replicas], sent


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the requests of the replicas that were simulated."""

    cluster: Cluster
    lives: Sequence[Life]
    """Of those replicas that were simulated."""
    sent: int
    """Requests that they were sent, of"""
    total: int
    """all that were looked at."""
    cut: bool
    """Whether the load has more."""

    @property
    def served(self) -> list[Served]:
        """Every request of the sample that has ended."""
        return [served for life in self.lives for served in life.served]

    @property
    def unserved(self) -> int:
        """Requests of the sample that wait for ever, for a static batch to fill."""
        return sum(life.num_open for life in self.lives)

    @property
    def duration(self) -> float:
        """Seconds until the last replica is idle."""
        return max(life.ended for life in self.lives)

    @property
    def utilization(self) -> float:
        """The share of the time that replicas are in a step, 0 to 1."""
        return sum(life.tally.busy for life in self.lives) / (self.duration * len(self.lives) or 1.0)

    @property
    def preemptions(self) -> int:
        """Of the sample."""
        return sum(life.counters.preemptions for life in self.lives)

    @property
    def occupancy(self) -> float:
        """Sequences in a step, on average."""
        steps = sum(life.tally.steps for life in self.lives)
        return sum(life.tally.sequences for life in self.lives) / (steps or 1)

    @property
    def peak_kv(self) -> float:
        """The largest share of its KV blocks that any replica used, 0 to 1."""
        return max(life.tally.peak_blocks for life in self.lives) / self.cluster.config.num_blocks

    @property
    def kv_waste(self) -> float:
        """The share of the blocks in use that holds nothing yet, over time, 0 to 1."""
        held = sum(life.tally.held_slots for life in self.lives)
        return sum(life.tally.wasted_slots for life in self.lives) / (held or 1.0)

    @property
    def prefix_hits(self) -> float:
        """The share of the prompts' tokens that a prefix cache held, 0 to 1."""
        queried = sum(life.counters.prefix_queried_tokens for life in self.lives)
        return sum(life.counters.prefix_hit_tokens for life in self.lives) / (queried or 1)

    @property
    def note(self) -> str:
        """What of this is exact."""
        simulated, replicas = len(self.lives), self.cluster.replicas
        if simulated == replicas:
            return "every replica was simulated"
        if self.cluster.routing == "least-loaded":
            return (
                f"approximate: {replicas:,} replicas were simulated as a cell of {simulated:,} with "
                f"{simulated:,}/{replicas:,} of the requests, which waits a little more than the whole would"
            )
        return f"a sample: {simulated:,} of {replicas:,} replicas were simulated, each with all that it would get"


def _submit(replica: Replica, arrival: Arrival, index: int) -> None:
    try:
        replica.submit(arrival, index)
    except ValueError as error:
        raise UnservableError(f"request {index} can never run: {error}") from error


def _num_open(replica: Replica) -> int:
    return replica.num_open
