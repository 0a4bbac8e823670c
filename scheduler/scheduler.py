"""Continuous batching by one rule: each step, computed tokens catch up with tokens, under a budget.

Running sequences come first, in order of admission; what is left of the budget admits waiting ones, first come, first
served. When blocks run out, the sequence admitted last gives its blocks back and waits to be computed again.
(Iteration-level scheduling: Orca, Yu et al. 2022, §3; chunked prefill: Sarathi-Serve, Agrawal et al. 2024, §4;
recomputation: PagedAttention, Kwon et al. 2023, §4.5.)
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from scheduler.batch import Appended, ScheduledBatch, ScheduledSequence
from scheduler.block_pool import BlockPool
from scheduler.request import FinishReason, Request, Sequence, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The limits of a step and of the memory."""

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    prefix_caching: bool = True

    @property
    def num_slots(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_blocks * self.block_size


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start."""

    preemptions: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0


class Scheduler:
    """Decides each step. Knows integers only: the same calls in the same order give the same decisions."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self.counters = SchedulerCounters()
        self._waiting: OrderedDict[Sequence, None] = OrderedDict()
        self._running: OrderedDict[Sequence, None] = OrderedDict()

    # what others ask

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks and take part in steps."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold nothing yet, or nothing any more."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether another step has something to do."""
        return bool(self._running or self._waiting)

    def refusal(self, num_tokens: int, n: int) -> str | None:
        """Why a request that may grow to ``num_tokens`` with ``n`` continuations can never run; None if it can."""
        if num_tokens > self.config.num_slots:
            slots = self.config.num_slots
            return f"the request may need {num_tokens} tokens of KV cache, but the cache holds {slots} in all"
        if n > self.config.max_num_seqs:
            return f"n = {n} is more than the {self.config.max_num_seqs} sequences that run at a time"
        return None

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it can never run."""
        reason = self.refusal(request.max_num_tokens, request.n)
        if reason is not None:
            raise ValueError(reason)
        self._waiting[request.sequences[0]] = None

    def abort(self, request: Request) -> None:
        """End every sequence of ``request`` now, whatever it is doing; what is ended already stays as it is."""
        for sequence in request.sequences:
            self.finish(sequence, "abort")

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End one sequence and free its blocks. Nothing happens if it has ended already."""
        if sequence.status is Status.FINISHED:
            return
        self._running.pop(sequence, None)
        self._waiting.pop(sequence, None)
        self._free_blocks(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason

    def check(self) -> None:
        """Raise AssertionError unless free + used = total and every reference is owned by a live sequence's table."""
        live = [*self._running, *self._waiting]
        self.pool.check(sequence.block_table for sequence in live)
        size = self.config.block_size
        for sequence in live:
            assert len(sequence.block_table) * size >= sequence.num_computed_tokens, "computed tokens without a block"
            assert sequence.num_computed_tokens <= sequence.num_tokens, "more tokens computed than there are"

    # a step

    def schedule(self) -> ScheduledBatch:
        """Choose what the next step computes, and take the blocks that it needs."""
        items: list[ScheduledSequence] = []
        copies: list[tuple[int, int]] = []
        budget = self.config.max_num_batched_tokens
        preempted = self.counters.preemptions
        for sequence, num_after in self._each_running():
            if budget == 0:
                break
            # Each sequence behind this one keeps a token of the budget: a long prompt does not stall their streams.
            num_tokens = min(sequence.num_uncomputed_tokens, max(budget - num_after, 1))
            if not self._make_room(sequence, num_tokens):
                break
            items.append(self._take(sequence, num_tokens, copies))
            budget -= num_tokens
        preempted = self.counters.preemptions - preempted
        if not preempted:
            self._admit(budget, items, copies)
        num_scheduled = sum(len(item.tokens) for item in items)
        return ScheduledBatch(tuple(items), tuple(copies), num_scheduled, preempted)

    def update(self, batch: ScheduledBatch, sampled: Iterable[Seq[int]]) -> list[Appended]:
        """Record a finished step: ``sampled[i]`` holds the ``num_samples`` tokens of ``batch.items[i]``."""
        appended: list[Appended] = []
        for index, (item, tokens) in enumerate(zip(batch.items, sampled, strict=True)):
            if len(tokens) != item.num_samples:
                raise ValueError(f"{item.num_samples} tokens were to be sampled, {len(tokens)} came")
            if item.sequence.status is Status.FINISHED:  # aborted while the step ran
                continue
            item.sequence.num_computed_tokens += len(item.tokens)
            branches = [item.sequence, *(self._fork(item.sequence) for _ in tokens[1:])]
            for number, token in enumerate(tokens):
                self._append(branches[number], token)
                appended.append(Appended(branches[number], index, number))
        return appended

    # the parts of a step

    def _each_running(self) -> Iterator[tuple[Sequence, int]]:
        """Running sequences in order of admission, each with how many come after it; ends where preemption has cut."""
        for position, sequence in enumerate(tuple(self._running)):
            if sequence.status is not Status.RUNNING:
                return
            yield sequence, len(self._running) - position - 1

    def _admit(self, budget: int, items: list[ScheduledSequence], copies: list[tuple[int, int]]) -> None:
        """Move waiting sequences, first come first served, into the step while budget, places and blocks last."""
        places = self.config.max_num_seqs - sum(map(_places, self._running))
        while self._waiting and budget > 0:
            sequence = next(iter(self._waiting))
            places -= _places(sequence)
            if places < 0 or not self._enter(sequence):
                return
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            items.append(self._take(sequence, num_tokens, copies))
            budget -= num_tokens

    def _enter(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run, on top of what the prefix cache holds of it, if all its tokens find a block."""
        size = self.config.block_size
        # The last token is always computed, since its logits are wanted: it never comes from the cache.
        hits = self._cached_blocks(sequence, (sequence.num_tokens - 1) // size)
        num_free = self.pool.num_free - sum(self.pool.ref_count(block) == 0 for block in hits)
        if _ceil_div(sequence.num_tokens, size) - len(hits) > num_free:
            return False
        self.pool.share(hits)
        sequence.block_table.extend(hits)
        sequence.num_computed_tokens = len(hits) * size
        sequence.status = Status.RUNNING
        del self._waiting[sequence]
        self._running[sequence] = None
        if sequence.request.cached_tokens is None:
            sequence.request.cached_tokens = sequence.num_computed_tokens
            self.counters.prefix_queried_tokens += sequence.num_tokens
            self.counters.prefix_hit_tokens += sequence.num_computed_tokens
        return True

    def _cached_blocks(self, sequence: Sequence, count: int) -> list[int]:
        """The cached blocks that hold the sequence's longest known prefix of at most ``count`` blocks."""
        if not self.config.prefix_caching:
            return []
        return self.pool.index.find_prefix(sequence.block_keys(count, self.config.block_size))

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Preempt from the back until ``num_tokens`` more fit; False if the sequence itself had to go."""
        while self._blocks_needed(sequence, num_tokens) > self.pool.num_free:
            victim = next(reversed(self._running))
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _blocks_needed(self, sequence: Sequence, num_tokens: int) -> int:
        end = sequence.num_computed_tokens + num_tokens
        new = _ceil_div(end, self.config.block_size) - len(sequence.block_table)
        return new + (self._shared_block(sequence) is not None)

    def _shared_block(self, sequence: Sequence) -> int | None:
        """The index in the table of the block that the next token would write to, if others hold it too."""
        index = sequence.num_computed_tokens // self.config.block_size
        table = sequence.block_table
        return index if index < len(table) and self.pool.ref_count(table[index]) > 1 else None

    def _take(self, sequence: Sequence, num_tokens: int, copies: list[tuple[int, int]]) -> ScheduledSequence:
        """Give the sequence the blocks of its next ``num_tokens`` tokens; room has been made."""
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
        shared = self._shared_block(sequence)
        if shared is not None:  # copy-on-write
            (block,) = self.pool.allocate(1)
            copies.append((sequence.block_table[shared], block))
            self.pool.release([sequence.block_table[shared]])
            sequence.block_table[shared] = block
        missing = _ceil_div(end, self.config.block_size) - len(sequence.block_table)
        sequence.block_table.extend(self.pool.allocate(missing))
        self._publish(sequence, start, end)
        complete = end == sequence.num_tokens
        return ScheduledSequence(
            sequence=sequence,
            start=start,
            tokens=sequence.tokens[start:end],
            block_table=sequence.block_table[:],
            num_samples=_places(sequence) if complete else 0,
        )

    def _publish(self, sequence: Sequence, start: int, end: int) -> None:
        """Enter the blocks that this step fills into the prefix index.

        That is done before they are computed: within a layer all KV is written before any is read, so a sequence
        admitted later in the same step may share them already.
        """
        first, last = start // self.config.block_size, end // self.config.block_size
        if first == last or not self.config.prefix_caching:
            return
        keys = sequence.block_keys(last, self.config.block_size)
        for index in range(first, last):
            self.pool.index.add(keys[index], sequence.block_table[index])

    def _preempt(self, sequence: Sequence) -> None:
        """Take the blocks back; the sequence waits, before all others, to be computed again."""
        del self._running[sequence]
        self._free_blocks(sequence)
        sequence.num_computed_tokens = 0
        sequence.status = Status.WAITING
        self._waiting[sequence] = None
        self._waiting.move_to_end(sequence, last=False)
        self.counters.preemptions += 1

    def _free_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        del sequence.block_table[:]

    def _fork(self, sequence: Sequence) -> Sequence:
        """One more continuation of the same request, sharing every block so far."""
        child = sequence.fork(len(sequence.request.sequences))
        self.pool.share(child.block_table)
        self._running[child] = None
        return child

    def _append(self, sequence: Sequence, token: int) -> None:
        sequence.tokens.append(token)
        reason = sequence.request.stop.finish_reason(sequence.num_output_tokens, token)
        if reason is not None:
            self.finish(sequence, reason)


def _places(sequence: Sequence) -> int:
    """How many running sequences this one is about to be: ``n`` until its prompt is computed and it forks, then one."""
    return 1 if sequence.request.forked else sequence.request.n


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
