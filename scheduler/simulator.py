"""One replica, simulated: the scheduler's own decisions, with a cost model in place of the model.

Time jumps from step to step. A step begins when the one before it has ended, with whatever arrived by then, and takes
as long as the cost model says; nothing else takes time. Every step is decided by `Scheduler`, none is skipped.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from scheduler.batch import ScheduledBatch, ScheduledSequence
from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel, Work
from scheduler.request import Request, StopRule
from scheduler.scheduler import Scheduler, SchedulerCounters

_TICK = 1e-6
"""Seconds by which time moves at least where the scheduler waits: sums of floats may miss a due moment by a bit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request to come: when, how long, and what its prompt shares with others'."""

    time: float
    """Seconds since the start."""
    prompt: int | array[int]
    """Tokens; or how many, and they are made up, equal to no other request's."""
    output: int | array[int]
    """The answer's tokens, which a later prompt may quote; or how many."""
    prefix: int | None = None
    """Which of the shared beginnings its prompt has; None for none."""
    prefix_tokens: int = 0
    """Tokens of that beginning, which come before those of ``prompt``."""
    cache_salt: str | None = None
    priority: int = 0
    tenant: str = ""

    def request(self, serial: int) -> Request:
        """The request as a scheduler takes it. Raises ValueError if there is no token in it, or none to come.

        A made-up prompt repeats one token, ``serial`` or (negative) its prefix's, as only equality counts: equality of
        whole blocks that is, which is what the prefix cache looks at.
        """
        tokens = array("i", [serial]) * self.prompt if isinstance(self.prompt, int) else self.prompt
        if self.prefix is not None:
            tokens = array("i", [-1 - self.prefix]) * self.prefix_tokens + tokens
        rule = StopRule(max_tokens=self.output if isinstance(self.output, int) else len(self.output))
        return Request(
            str(serial), tokens, rule, cache_salt=self.cache_salt, priority=self.priority, tenant=self.tenant
        )


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
    sequences: int = 0
    """In all steps together."""
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
        self.sequences += len(batch.items)
        self.busy += seconds
        self.peak_blocks = max(self.peak_blocks, used_blocks)
        self.held_slots += used_blocks * block_size * seconds
        self.wasted_slots += (allotted - work.context) * seconds


@dataclass(frozen=True, slots=True)
class Life:
    """What a replica leaves behind."""

    served: list[Served]
    """Requests that have ended, in that order."""
    num_open: int
    """Requests that have not. Some never will, where static batching waits for more than ever come."""
    ended: float
    """Seconds from the start to its last moment."""
    tally: Tally
    counters: SchedulerCounters


Ended = Callable[[Served], object]
"""Told of a request when it has ended."""


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
        self._answers: dict[str, array[int]] = {}
        self._batch: ScheduledBatch | None = None
        self._ends = 0.0

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    @property
    def life(self) -> Life:
        """All that there is to say of it so far."""
        return Life(self.served, len(self._open), self.now, self.tally, self.scheduler.counters)

    def submit(self, arrival: Arrival, serial: int) -> None:
        """Queue a request, which takes part in the next step to begin. Raises ValueError if it can never run."""
        if self._batch is None:
            self.now = max(self.now, arrival.time)
        request = arrival.request(serial)
        self.scheduler.add(request, arrival.time)
        self._open[request.request_id] = Served(serial, arrival.time, request.num_prompt_tokens)
        if not isinstance(arrival.output, int):
            self._answers[request.request_id] = arrival.output

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
                work = work_of(batch, scheduler.config.block_size)
                seconds = self._cost.seconds(work)
                self.tally.count(work, batch, seconds, scheduler.pool.num_used, scheduler.config.block_size)
                self._batch, self._ends = batch, self.now + seconds
                return True
            if batch.num_preempted or not scheduler.has_work:
                continue
            due = scheduler.next_event()
            if due is None or due >= until:  # a batch may wait for requests to come
                return False
            self.now = max(due, self.now + _TICK)
        return False

    def _finish(self, batch: ScheduledBatch) -> None:
        self._batch, self.now = None, self._ends
        if self._answers:
            sampled = [self._sampled(item) for item in batch.items]
        else:
            sampled = [[0] * item.num_samples for item in batch.items]
        for new in self.scheduler.update(batch, sampled):
            request = new.sequence.request
            if len(new.sequence.tokens) == request.num_prompt_tokens + 1:
                self._open[request.request_id].first = self.now
            if new.sequence.finish_reason is not None:
                self._end(request, new.sequence.num_output_tokens)

    def _sampled(self, item: ScheduledSequence) -> list[int]:
        """The tokens that are sampled for an item: none or one."""
        answer = self._answers.get(item.sequence.request.request_id)
        token = 0 if answer is None or not item.num_samples else answer[item.sequence.num_output_tokens]
        return [token] * item.num_samples

    def _end(self, request: Request, output_tokens: int | None) -> None:
        served = self._open.pop(request.request_id)
        self._answers.pop(request.request_id, None)
        served.last = self.now
        served.output_tokens = output_tokens or 0
        served.cached_tokens = request.cached_tokens or 0
        self.served.append(served)
        if self._ended is not None:
            self._ended(served)


def work_of(batch: ScheduledBatch, block_size: int) -> Work:
    """The work of a scheduled step; a copy on the device is too quick to count."""
    moves = len(batch.transfers.out) + len(batch.transfers.back)
    return Work.of([(item.start, len(item.tokens), item.num_samples) for item in batch.items], moves * block_size)
