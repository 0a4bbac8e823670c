"""What the scheduler hands to the engine for one step: plain data, a snapshot that later decisions do not change."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from scheduler.request import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's share of a step."""

    sequence: Sequence
    """Whose share it is. Its fields go on changing: the worker reads the snapshot below instead."""
    start: int
    """The position of the first token to compute: as many are computed already."""
    tokens: array[int]
    """The tokens to compute, int32."""
    block_table: array[int]
    """Block of each ``block_size`` positions, int32, long enough for all tokens up to the last one here."""
    num_samples: int
    """Tokens to sample after the last position: 0 inside a prompt, ``n`` where a prompt ends and forks, else 1."""


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step. ``copies`` come first: all sources are read before any destination is written."""

    items: tuple[ScheduledSequence, ...]
    copies: tuple[tuple[int, int], ...]
    """(source block, destination block) of each copy-on-write."""
    num_tokens: int
    num_preempted: int

    def __bool__(self) -> bool:
        return bool(self.items)


@dataclass(frozen=True, slots=True)
class Appended:
    """That a sampled token was appended; ``sequence.finish_reason`` says whether it was the last one."""

    sequence: Sequence
    item: int
    """Whose sample it was: the index in ``ScheduledBatch.items``,"""
    sample: int
    """and among that item's samples."""
