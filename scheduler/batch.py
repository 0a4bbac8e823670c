"""What the scheduler hands to the engine for one step: plain data, a snapshot that later decisions do not change.

Tuples, since one is made per sequence and step: a frozen dataclass takes three times as long to make.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from scheduler.kv_budget import KVBudget
from scheduler.request import Sequence

Move = tuple[int, int]
"""A block's content goes from the first to the second."""


class ScheduledSequence(NamedTuple):
    """One sequence's share of a step."""

    sequence: Sequence
    """Whose share it is. Its fields go on changing: the worker reads the snapshot below instead."""
    start: int
    """The position of the first token to compute: as many are computed already."""
    tokens: array[int]
    """The tokens to compute, int32."""
    block_table: array[int]
    """Block of each ``block_size`` slots, int32, long enough for all tokens up to the last one here."""
    num_samples: int
    """Tokens to sample after the last position: 0 inside a prompt, or where nothing is to follow it; ``n`` where a
    prompt ends and forks, else 1."""
    num_dropped: int = 0
    """By how much a token's slot is less than its position."""
    kv_budget: KVBudget | None = None
    observed: range = range(0)
    """The positions among the tokens' for which the model's output is wanted besides."""


class Transfers(NamedTuple):
    """Blocks to move before a step computes: all of ``out``, then all ``copies``, then all of ``back``.

    So what a block held is read before its next owner has it written. Within each group all sources are read before
    any destination is written.
    """

    out: tuple[Move, ...] = ()
    """(device block, host block)."""
    copies: tuple[Move, ...] = ()
    """(device block, device block), of each copy-on-write."""
    back: tuple[Move, ...] = ()
    """(host block, device block)."""


class Compaction(NamedTuple):
    """A sequence whose policy selects before the step computes, after the transfers.

    In every layer, for each KV head the selected slots of ``source`` move to the first slots of ``target``, in order;
    all are read before any is written.
    """

    sequence: Sequence
    source: array[int]
    """The blocks of its ``num_slots`` slots."""
    num_slots: int
    target: array[int]
    """Blocks of its own, of which some may be the source's."""
    num_kept: int
    num_dropped: int
    """By how much a slot behind the first ``num_kept`` was less than its token's position; these too, if it is 0."""


class ScheduledBatch(NamedTuple):
    """One step."""

    items: tuple[ScheduledSequence, ...]
    transfers: Transfers
    num_tokens: int
    num_preempted: int
    evicted: tuple[tuple[Sequence, int], ...] = ()
    """Sequences whose budget took KV from them, and of how many tokens."""
    compactions: tuple[Compaction, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.items) or any(self.transfers)


class Appended(NamedTuple):
    """That a sampled token was appended; ``sequence.finish_reason`` says whether it was the last one."""

    sequence: Sequence
    item: int
    """Whose sample it was: the index in ``ScheduledBatch.items``,"""
    sample: int
    """and among that item's samples."""
