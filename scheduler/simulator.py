"""One replica, simulated: the scheduler's own decisions, with a cost model in place of the model.

Time jumps from step to step. A step begins when the one before it has ended, with whatever arrived by then, and takes
as long as the cost model says; nothing else takes time. Every step is decided by `Scheduler`, none is skipped.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from scheduler.batch import ScheduledBatch
from scheduler.cost_model import CostModel, Work
from scheduler.request import Request, StopRule
from scheduler.scheduler import Scheduler, SchedulerConfig

_TICK = 1e-6
"""Seconds by which time moves at least where the scheduler waits: sums of floats may miss a due moment by a bit."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come: when, how long, and what its prompt shares with others'."""

    time: float
    """Seconds since the start."""
    prompt: int | array[int]
    """Tokens; or how many, and they are made up, equal to no other request's."""
    output_tokens: int
    prefix: int | None = None
    """Which of the shared beginnings its prompt has; None for none."""
    prefix_tokens: int = 0
    """Tokens of that beginning, which come before those of ``prompt``."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the whole prompt."""
        own = self.prompt if isinstance(self.prompt, int) else len(self.prompt)
        return own + (0 if self.prefix is None else self.prefix_tokens)

    def tokens(self, serial: int) -> array[int]:
        """The prompt: a made-up one repeats one token, ``serial`` or (negative) its prefix's, as only equality counts.

        Equality of whole blocks that is, which is what the prefix cache looks at.
        """
        own = array("i", [serial]) * self.prompt if isinstance(self.prompt, int) else self.prompt
        return own if self.prefix is None else array("i", [-1 - self.prefix]) * self.prefix_tokens + own


@dataclass(slots=True)
class Served:
    """What became of a request. Times are seconds since the start."""

    serial: int
    arrival: float
    prompt_tokens: int
    first: float | None = None
    """When its first token was there; None if it timed out in the queue."""
    last: float = 0.0
    """When its last token was there, or when it timed out."""
    output_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True)
class Tally:
    """What a replica did in all."""

    steps: int = 0
    sequence_steps: int = 0
    """Sequences in all steps: what simulating costs."""
    busy: float = 0.0
    """Seconds in steps."""
    peak_blocks: int = 0
    held_slots: float = 0.0
    """Slots (one token's KV) of all blocks in use × seconds."""
    wasted_slots: float = 0.0
    """Those of them that hold nothing yet × seconds: the ends of last blocks."""

    def count(self, work: Work, batch: ScheduledBatch, seconds: float, used_blocks: int, block_size: int) -> None:
        """Add a step."""
        allotted = block_size * sum([len(item.block_table) for item in batch.items])
        self.steps += 1
        self.sequence_steps += len(batch.items)
        self.busy += seconds
        self.peak_blocks = max(self.peak_blocks, used_blocks)
        self.held_slots += used_blocks * block_size * seconds
        self.wasted_slots += (allotted - work.context) * seconds


Ended = Callable[[Served], object]
"""Told of a request when it has ended."""


class StalledError(RuntimeError):
    """The scheduler has work, does nothing, and waits for nothing."""


class Replica:
    """A scheduler and its clock. Requests are submitted in order of time, each once `advance` has come as far."""

    def __init__(self, config: SchedulerConfig, cost: CostModel, ended: Ended | None = None) -> None:
        self.scheduler = Scheduler(config)
        self.now = 0.0
        self.tally = Tally()
        self.served: list[Served] = []
        """Those that have ended, in that order."""
        self._cost = cost
        self._ended = ended
        self._open: dict[str, Served] = {}
        self._batch: ScheduledBatch | None = None
        self._ends = 0.0

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def submit(self, arrival: Arrival, serial: int) -> None:
        """Queue a request, which takes part in the next step to begin. Raises ValueError if it can never run."""
        if self._batch is None:
            self.now = max(self.now, arrival.time)
        request = Request(str(serial), arrival.tokens(serial), StopRule(max_tokens=arrival.output_tokens))
        self.scheduler.add(request, arrival.time)
        self._open[request.request_id] = Served(serial, arrival.time, request.num_prompt_tokens)

    def advance(self, until: float = inf) -> None:
        """Live on until all is idle, or until ``until``: steps that end by then have ended, later ones have begun."""
        while True:
            if self._batch is None:
                if self.now >= until or not self._begin(until):
                    return
            elif self._ends > until:
                return
            else:
                self._finish(self._batch)

    def _begin(self, until: float) -> bool:
        """Begin the next step; False if none begins before ``until``."""
        scheduler = self.scheduler
        while scheduler.has_work:
            for request in scheduler.expire(self.now):
                self._end(request, None)
            batch = scheduler.schedule(self.now)
            if batch:
                work = Work.of(batch)
                seconds = self._cost.seconds(work)
                self.tally.count(work, batch, seconds, scheduler.pool.num_used, scheduler.config.block_size)
                self._batch, self._ends = batch, self.now + seconds
                return True
            if batch.num_preempted or not scheduler.has_work:
                continue
            due = scheduler.next_event()
            if due is None:
                if until < inf:  # a batch may wait for requests to come
                    return False
                raise StalledError(f"{scheduler.num_waiting} requests wait for others that never come")
            if due >= until:
                return False
            self.now = max(due, self.now + _TICK)
        return False

    def _finish(self, batch: ScheduledBatch) -> None:
        self._batch, self.now = None, self._ends
        sampled = [[0] * item.num_samples for item in batch.items]
        for new in self.scheduler.update(batch, sampled):
            request = new.sequence.request
            if len(new.sequence.tokens) == request.num_prompt_tokens + 1:
                self._open[request.request_id].first = self.now
            if new.sequence.finish_reason is not None:
                self._end(request, new.sequence.num_output_tokens)

    def _end(self, request: Request, output_tokens: int | None) -> None:
        served = self._open.pop(request.request_id)
        served.last = self.now
        served.output_tokens = output_tokens or 0
        served.cached_tokens = request.cached_tokens or 0
        self.served.append(served)
        if self._ended is not None:
            self._ended(served)
