"""Continuous batching by one rule: each step, computed tokens catch up with tokens, under a budget.

Running sequences come first, in the order of service; what is left of the budget admits those that had to give their
blocks back, and then waiting requests. When blocks run out, the sequence that is last in the order goes, and waits.
(Iteration-level scheduling: Orca, Yu et al. 2022, §3; chunked prefill: Sarathi-Serve, Agrawal et al. 2024, §4;
preemption by recomputation and by swapping: PagedAttention, Kwon et al. 2023, §4.5.)
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from scheduler.batch import Appended, ScheduledBatch, ScheduledSequence
from scheduler.block_pool import BlockPool
from scheduler.config import SchedulerConfig
from scheduler.kv_memory import KVMemory
from scheduler.request import FinishReason, Rank, Request, Sequence, Status
from scheduler.waiting_queue import WaitingQueue


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start."""

    preemptions: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    blocks_swapped_out: int = 0
    blocks_swapped_in: int = 0


class Scheduler:
    """Decides each step. Knows numbers only: the same calls in the same order give the same decisions.

    Times are seconds of whatever clock the caller has, and never run backwards.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.counters = SchedulerCounters()
        self._memory = KVMemory(
            config.num_blocks,
            config.block_size,
            num_host_blocks=config.num_host_blocks,
            prefix_caching=config.prefix_caching,
            step_tokens=config.max_num_batched_tokens,
        )
        self._queue = WaitingQueue(config.order)
        self._charging = config.order.policy == "fair"
        self._running: list[Sequence] = []  # in order of rank, as the next
        self._returning: list[Sequence] = []  # that were preempted
        self._begun: set[Request] = set()  # that were admitted and have not ended
        self._batch: list[Request] = []  # that is being admitted: who was chosen for it and has not begun
        self._deadlines: list[tuple[float, Rank, Request]] = []
        self._serial = 0

    # what others ask

    @property
    def pool(self) -> BlockPool:
        """The device's blocks."""
        return self._memory.device

    @property
    def host_pool(self) -> BlockPool | None:
        """The host tier's blocks."""
        return self._memory.host

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks and take part in steps."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that have not run yet, and sequences that wait to run again."""
        return len(self._queue) + len(self._returning)

    @property
    def num_queued(self) -> int:
        """Requests that have not run yet."""
        return len(self._queue)

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens of the requests that have not run yet."""
        return self._queue.num_tokens

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._begun or self._queue)

    def next_event(self) -> float | None:
        """When something becomes due though nothing else happens: a delayed batch, or the end of somebody's time."""
        times = [self._deadlines[0][0]] if self._deadlines else []
        oldest = self._queue.oldest
        if oldest is not None:
            if self.config.queue_timeout is not None:
                times.append(oldest.arrival + self.config.queue_timeout)
            if not self._begun and (due := self.config.batching.due(oldest.arrival)) is not None:
                times.append(due)
        return min(times, default=None)

    def check(self) -> None:
        """Raise AssertionError unless free + used = total and every reference is owned by a live sequence's table."""
        live = [s for request in self._begun for s in request.sequences if s.status is not Status.FINISHED]
        self._memory.check(live)
        for own, status in ((self._running, Status.RUNNING), (self._returning, Status.WAITING)):
            there = [s for s in live if s.status is status and (status is Status.RUNNING or not s.parked)]
            assert own == sorted(there, key=_rank), "a sequence is not where it belongs"

    # a request's way in and out

    def add(self, request: Request, now: float = 0.0) -> None:
        """Queue a request. Raises ValueError if it can never run."""
        reason = self.config.refusal(request.max_num_tokens, request.num_places, request.kv_budget)
        if reason is not None:
            raise ValueError(reason)
        self._serial += 1
        request.arrival = now
        request.rank = self.config.order.rank(request, self._serial)
        self._queue.add(request)
        if request.deadline is not None:
            if len(self._deadlines) > 64 + 2 * (len(self._queue) + len(self._begun)):
                self._deadlines = [entry for entry in self._deadlines if not entry[2].finished]
                heapify(self._deadlines)
            heappush(self._deadlines, (request.deadline, request.rank, request))

    def abort(self, request: Request, *, tainted: bool = False) -> None:
        """End every sequence of ``request`` now, whatever it is doing; what is ended already stays as it is.

        What a ``tainted`` one has computed is found in no prefix cache any more.
        """
        if tainted:
            for sequence in request.sequences:
                self._memory.forget(sequence)
        self._end(request, "abort")

    def discard(self, batch: ScheduledBatch) -> list[Request]:
        """Instead of `update`: the step failed, and nobody knows what it has computed or moved.

        Ends all requests that have KV, and says which; those that wait are not concerned.
        """
        self._memory.end_step()
        self._memory.forget_moves(batch.transfers)
        lost = sorted(self._begun, key=lambda request: request.rank)
        for request in lost:
            self.abort(request, tainted=True)
        return lost

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End one sequence and free its blocks. Nothing happens if it has ended already."""
        self._finish(sequence, reason)

    def expire(self, now: float) -> list[Request]:
        """End the requests whose deadline or whose time in the queue is up, and say which those are."""
        expired: list[Request] = []
        for request in self._due(now):
            if not request.finished:
                self._end(request, "timeout")
                expired.append(request)
        return expired

    def _due(self, now: float) -> Iterator[Request]:
        """Requests whose time is up, some of which may have ended; each is ended before the next is asked for."""
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].finished):
            yield heappop(self._deadlines)[2]
        timeout = self.config.queue_timeout
        while timeout is not None and (oldest := self._queue.oldest) and oldest.arrival + timeout <= now:
            yield oldest

    def close(self) -> None:
        """The last call."""

    def _end(self, request: Request, reason: FinishReason) -> None:
        for sequence in tuple(request.sequences):
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.RUNNING:
            _remove(self._running, sequence)
        else:
            _remove(self._returning, sequence)
        self._memory.free(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        if sequence.request.finished:
            self._begun.discard(sequence.request)
            self._queue.remove(sequence.request)

    # a step

    def schedule(self, now: float = 0.0) -> ScheduledBatch:
        """Choose what the next step computes, and take the blocks that it needs. Empty if all there is has to wait."""
        items: list[ScheduledSequence] = []
        preempted = self.counters.preemptions
        budget = self._continue(items)
        if self.counters.preemptions == preempted:  # who made room does not take it back in the same step
            self._admit(budget, items, now)
        while not items and self._returning and self._running:
            # All that run are beams which wait for others, and those find no room: the last in order makes some.
            self._preempt(self._running[-1])
            self._admit(self.config.max_num_batched_tokens, items, now)
        transfers = self._memory.take_transfers()
        self.counters.blocks_swapped_out += len(transfers.out)
        self.counters.blocks_swapped_in += len(transfers.back)
        num_tokens = sum([len(item.tokens) for item in items])
        return ScheduledBatch(
            tuple(items),
            transfers,
            num_tokens,
            self.counters.preemptions - preempted,
            self._memory.take_evicted(),
            self._memory.take_compactions(),
        )

    def update(self, batch: ScheduledBatch, sampled: Iterable[Seq[int]]) -> list[Appended]:
        """Record a finished step: ``sampled[i]`` holds the ``num_samples`` tokens of ``batch.items[i]``.

        What is sampled for a beam is not looked at: `advance` says how its search goes on. Who wants no token ends with
        its prompt.
        """
        self._memory.end_step()
        appended: list[Appended] = []
        for index, (item, tokens) in enumerate(zip(batch.items, sampled, strict=True)):
            sequence = item.sequence
            if sequence.status is Status.FINISHED:  # aborted while the step ran
                continue
            sequence.num_computed_tokens += len(item.tokens)
            if sequence.request.beam_width is not None:
                sequence.parked = item.num_samples > 0
                continue
            if len(tokens) != item.num_samples:
                raise ValueError(f"{item.num_samples} tokens were to be sampled, {len(tokens)} came")
            if sequence.request.stop.max_tokens == 0 and sequence.num_uncomputed_tokens == 0:
                self._finish(sequence, "length")
            forks = [self._fork(sequence) for _ in tokens[1:]] if len(tokens) > 1 else []
            for number, token in enumerate(tokens):
                branch = forks[number - 1] if number else sequence
                self._append(branch, token)
                appended.append(Appended(branch, index, number))
        return appended

    def advance(self, request: Request, extensions: Seq[tuple[Sequence, int]]) -> list[Sequence]:
        """Take the next step of a beam search: each (parent, token) goes on, parents that are not named have ended.

        Returns the sequences that carry the extensions on, in the same order; a parent's first extension keeps the
        parent, its others fork from it. All beams must be parked.
        """
        chosen = [parent for parent, _ in extensions]
        for sequence in request.sequences:
            if sequence not in chosen:
                self._finish(sequence, "abort")
        request.sequences = [sequence for sequence in request.sequences if sequence in chosen]
        seen: set[Sequence] = set()
        beams: list[Sequence] = []
        for parent in chosen:
            beams.append(self._fork(parent) if parent in seen else parent)
            seen.add(parent)
        for beam, (_, token) in zip(beams, extensions, strict=True):
            if beam.parked and beam.status is Status.WAITING:
                insort(self._returning, beam, key=_rank)
            beam.parked = False
            beam.tokens.append(token)
        return beams

    # the parts of a step

    def _continue(self, items: list[ScheduledSequence]) -> int:
        """Let running sequences go on, in order; returns what is left of the budget."""
        budget = self.config.max_num_batched_tokens
        num_after = len(self._running)
        for sequence in tuple(self._running):
            num_after -= 1
            if budget == 0 or sequence.status is not Status.RUNNING:  # preempted, and so are all behind it
                break
            missing = len(sequence.tokens) - sequence.num_computed_tokens
            if missing == 0:
                continue
            # Each sequence behind this one keeps a token of the budget: a long prompt does not stall their streams.
            num_tokens = min(missing, max(budget - num_after, 1))
            if sequence.request.kv_budget is not None:
                self._memory.drop(sequence)
                num_tokens = min(num_tokens, sequence.max_step)
            if not self._make_room(sequence, num_tokens):
                break
            items.append(self._take(sequence, num_tokens))
            budget -= num_tokens
        return budget

    def _admit(self, budget: int, items: list[ScheduledSequence], now: float) -> None:
        """Move waiting sequences into the step while budget, places and blocks last; those that ran before first."""
        if budget == 0 or not (self._returning or self._queue):
            return
        places = self.config.max_num_seqs - sum([_places(sequence) for sequence in self._running])
        promised = sum([self._memory.missing_blocks(sequence) for sequence in self._running if not sequence.parked])
        while budget > 0 and (sequence := self._next(now)) is not None:
            places -= _places(sequence)
            if places < 0 or not self._memory.enter(sequence, promised):
                return
            self._begin(sequence)
            num_tokens = min(sequence.num_uncomputed_tokens, sequence.max_step, budget)
            items.append(self._take(sequence, num_tokens))
            promised += self._memory.missing_blocks(sequence)
            budget -= num_tokens

    def _next(self, now: float) -> Sequence | None:
        """Who may enter next."""
        if self._returning:
            return self._returning[0]
        head = self._queue.head() if self.config.batching.refills else self._next_of_batch(now)
        return None if head is None else head.sequences[0]

    def _next_of_batch(self, now: float) -> Request | None:
        """Who of the batch that is being admitted is next. Once all have ended, a new batch is chosen as a whole."""
        self._batch = [request for request in self._batch if request in self._queue]
        oldest = self._queue.oldest
        if oldest is not None and not (self._begun or self._batch):
            self._batch = self._queue.first(self.config.batching.places(len(self._queue), oldest.arrival, now))
        return self._batch[0] if self._batch else None

    def _begin(self, sequence: Sequence) -> None:
        """A sequence that has entered the memory runs from now on."""
        request = sequence.request
        sequence.status = Status.RUNNING
        insort(self._running, sequence, key=_rank)
        if self._returning and self._returning[0] is sequence:
            del self._returning[0]
            return
        self._queue.admit(request)
        self._begun.add(request)
        request.cached_tokens = sequence.num_computed_tokens
        if self.config.prefix_caching:
            self.counters.prefix_queried_tokens += sequence.num_tokens
            self.counters.prefix_hit_tokens += sequence.num_computed_tokens

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Preempt from the back until ``num_tokens`` more fit; False if the sequence itself had to go."""
        while self._memory.blocks_needed(sequence, num_tokens) > self._memory.device.num_free:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _take(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        """The sequence's share of the step: its next ``num_tokens`` tokens, for which room has been made."""
        self._memory.grow(sequence, num_tokens)
        if self._charging:
            self._queue.charge(sequence.request, num_tokens)
        start = sequence.num_computed_tokens
        end = start + num_tokens
        request = sequence.request
        tokens, table = sequence.tokens[start:end], sequence.block_table[:]
        num_samples = 0 if end < len(sequence.tokens) else _num_samples(sequence)
        observed = request.observed
        if observed:
            observed = range(max(observed.start, start), min(observed.stop, end))
        return ScheduledSequence(
            sequence, start, tokens, table, num_samples, sequence.num_dropped, request.kv_budget, observed
        )

    def _preempt(self, sequence: Sequence) -> None:
        """Take the blocks back; the sequence waits, before all that have not run yet, to go on or to be recomputed."""
        self._running.pop()
        if self.config.preemption == "recompute" or not self._memory.swap_out(sequence):
            self._memory.free(sequence)
            sequence.num_computed_tokens = sequence.num_dropped = 0
        sequence.status = Status.WAITING
        if not sequence.parked:
            insort(self._returning, sequence, key=_rank)
        self.counters.preemptions += 1

    def _fork(self, parent: Sequence) -> Sequence:
        """One more continuation, sharing every block so far; where it has no place it waits, and holds nothing."""
        child = parent.fork()
        if parent.status is Status.RUNNING and len(self._running) < self.config.max_num_seqs:
            self._memory.fork(parent, child)
            child.status = Status.RUNNING
        insort(self._running if child.status is Status.RUNNING else self._returning, child, key=_rank)
        return child

    def _append(self, sequence: Sequence, token: int) -> None:
        tokens, request = sequence.tokens, sequence.request
        tokens.append(token)
        reason = request.stop.finish_reason(len(tokens) - request.num_prompt_tokens, token)
        if reason is not None:
            self._finish(sequence, reason)


def _rank(sequence: Sequence) -> tuple[Rank, int]:
    return sequence.rank


def _remove(ordered: list[Sequence], sequence: Sequence) -> None:
    """Take a sequence out of a list in order of rank, if it is in."""
    index = bisect_left(ordered, sequence.rank, key=_rank)
    if index < len(ordered) and ordered[index] is sequence:
        del ordered[index]


def _num_samples(sequence: Sequence) -> int:
    """How many tokens follow it once all that it has now is computed."""
    request = sequence.request
    return 0 if request.stop.max_tokens == 0 else 1 if request.beam_width else _places(sequence)


def _places(sequence: Sequence) -> int:
    """How many running sequences this one is about to be: all its request's until it forks, then one."""
    request = sequence.request
    return 1 if request.num_forked >= request.num_places else request.num_places
