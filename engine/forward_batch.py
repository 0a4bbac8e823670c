"""One step's tensors: the scheduled sequences' tokens, of any number each, laid end to end."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.kv_policies.policy import KVPolicy, Pruner
from kernels.counted import Counted
from kernels.pruning import Pruning
from scheduler.batch import ScheduledSequence
from scheduler.kv_budget import KVBudget, Selection, Window

_Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class SlotLimits:
    """What sequences with a policy's `Window` as their budget see; the others have zeros."""

    windows: Tensor
    """[B] int32."""
    sinks: Tensor
    """[B] int32."""
    sink_positions: Tensor | None
    """[T] int64: the position that a token's query has for the sinks, no farther than the end of the window; None
    where nobody has any."""

    @classmethod
    def build(cls, items: Sequence[ScheduledSequence], positions: "_Numbers", owner: "_Numbers") -> "SlotLimits | None":
        """The limits of a step, if any sequence has some."""
        budgets = [_limit(item.kv_budget) for item in items]
        if not any(budgets):
            return None
        windows = np.array([0 if budget is None else budget.window for budget in budgets], dtype=np.int64)
        sinks = np.array([0 if budget is None else budget.sinks for budget in budgets], dtype=np.int64)
        ends = np.where(sinks > 0, windows + sinks - 1, np.iinfo(np.int64).max)
        return cls(
            windows=torch.from_numpy(windows.astype(np.int32)),
            sinks=torch.from_numpy(sinks.astype(np.int32)),
            sink_positions=torch.from_numpy(np.minimum(positions, ends[owner])) if sinks.any() else None,
        )

    def to(self, device: torch.device) -> "SlotLimits":
        """The same on a device."""
        positions = self.sink_positions
        return SlotLimits(
            self.windows.to(device), self.sinks.to(device), None if positions is None else positions.to(device)
        )


@dataclass(frozen=True, slots=True)
class PrunedSequence:
    """A sequence whose policy prunes within attention."""

    index: int
    """Which of the batch's sequences it is."""
    pruning: Pruning
    begins: bool
    """Whether this is its first step."""
    first_output: int
    """The first of the batch's rows that is not one of its prompt's tokens."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """B sequences with T tokens in all, of which R positions' outputs are wanted."""

    tokens: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64: where in its sequence each token stands."""
    slots: Tensor
    """[T] int64: block · block_size + offset, where each token's key and value go."""
    query_start: Tensor
    """[B + 1] int32: sequence b's tokens are query_start[b] … query_start[b + 1] − 1."""
    seq_lens: Tensor
    """[B] int32: slots in the KV cache, this step's included."""
    block_tables: Tensor
    """[B, M] int32; entries beyond a sequence's blocks are 0 and mean nothing."""
    output_rows: Tensor
    """[R] int64: indices into T, those of observed positions first, then those to sample from."""
    num_observed: int = 0
    """How many those are."""
    limits: SlotLimits | None = None
    counted: Counted | None = None
    """Which queries' attention each sequence counts; None if all count none."""
    selected: Tensor | None = None
    """[B] bool: whose KV a policy has selected before, so that heads may not see its first slots; None: nobody's."""
    pruned: tuple["PrunedSequence", ...] = ()
    """The sequences whose policy prunes within attention."""

    def wanted(self, x: Tensor) -> Tensor:
        """x [T, …] → its R rows whose outputs are wanted."""
        whole = len(self.output_rows) == len(x) and not self.num_observed  # then they are all, in order
        return x if whole else x[self.output_rows]

    @classmethod
    def build(
        cls,
        items: Sequence[ScheduledSequence],
        block_size: int,
        device: torch.device,
        policies: Mapping[str, KVPolicy] = MappingProxyType({}),
    ) -> "ForwardBatch":
        """Lay out the scheduled sequences. ``policies`` by request id are those of the selecting ones."""
        counts = np.array([len(item.tokens) for item in items], dtype=np.int64)
        starts = np.array([item.start for item in items], dtype=np.int64)
        tables = np.zeros((len(items), max(len(item.block_table) for item in items)), dtype=np.int32)
        tokens = array("i")
        for row, item in zip(tables, items, strict=True):
            tokens.extend(item.tokens)
            row[: len(item.block_table)] = item.block_table
        ends = np.cumsum(counts)
        owner = np.repeat(np.arange(len(items)), counts)
        positions = np.arange(len(tokens)) + (starts - ends + counts)[owner]
        dropped = np.array([item.num_dropped for item in items], dtype=np.int64)
        places = positions - dropped[owner]
        slots = tables[owner, places // block_size].astype(np.int64) * block_size + places % block_size
        sampled = ends[np.array([item.num_samples > 0 for item in items])] - 1
        observed = _observed(items, ends - counts)

        def on_device(values: _Numbers, dtype: type) -> Tensor:
            return torch.from_numpy(values.astype(dtype, copy=False)).to(device, non_blocking=True)

        return cls(
            tokens=on_device(np.array(tokens), np.int64),
            positions=on_device(positions, np.int64),
            slots=on_device(slots, np.int64),
            query_start=on_device(np.concatenate(([0], ends)), np.int32),
            seq_lens=on_device(starts + counts - dropped, np.int32),
            block_tables=torch.from_numpy(tables).to(device, non_blocking=True),
            output_rows=on_device(np.concatenate((observed, sampled)), np.int64),
            num_observed=len(observed),
            **_of_budgets(items, positions, owner, ends - counts, policies, device),
        )


def _limit(budget: KVBudget | None) -> Window | None:
    """A window that is narrower than the model's own, which its layers know."""
    return budget if isinstance(budget, Window) and not budget.own else None


def _observed(items: Sequence[ScheduledSequence], rows: "_Numbers") -> "_Numbers":
    """The rows of observed positions."""
    ranges = [
        np.arange(item.observed.start, item.observed.stop) - item.start + row
        for item, row in zip(items, rows, strict=True)
        if item.observed
    ]
    return np.concatenate(ranges) if ranges else np.empty(0, dtype=np.int64)


def _of_budgets(
    items: Sequence[ScheduledSequence],
    positions: "_Numbers",
    owner: "_Numbers",
    rows: "_Numbers",
    policies: Mapping[str, KVPolicy],
    device: torch.device,
) -> dict[str, Any]:
    """The batch's fields that only sequences with a KV budget need; a step without any is not slowed down."""
    if all(item.kv_budget is None for item in items):
        return {}
    limits = SlotLimits.build(items, positions, owner)
    return {
        "limits": None if limits is None else limits.to(device),
        "counted": _counted(items, rows, device),
        "selected": _selected(items, device),
        "pruned": _pruned(items, rows, policies),
    }


def _counted(items: Sequence[ScheduledSequence], rows: "_Numbers", device: torch.device) -> Counted | None:
    """The first row that counts of each sequence, which begins at ``rows``, and how many slots keep their sums."""
    pairs = [_counted_of(item, row) for item, row in zip(items, rows.tolist(), strict=True)]
    if all(kept < 0 for _, kept in pairs):
        return None
    first, kept = torch.tensor(pairs, dtype=torch.int32, device=device).unbind(1)
    return Counted(first.contiguous(), kept.contiguous())


def _counted_of(item: ScheduledSequence, row: int) -> tuple[int, int]:
    counted = item.kv_budget.counted if isinstance(item.kv_budget, Selection) else "none"
    count, before = len(item.tokens), item.start - item.num_dropped
    match counted:
        case "none":
            return row, -1
        case "all":
            return row, before
        case "last":
            return row + count - 1, 0
    num_prompt = item.sequence.request.num_prompt_tokens
    first = max(num_prompt - counted, 0)
    if item.start >= num_prompt or item.start + count <= first:
        return row, -1
    return row + max(first - item.start, 0), before if item.start > first else 0


def _selected(items: Sequence[ScheduledSequence], device: torch.device) -> Tensor | None:
    selected = [isinstance(item.kv_budget, Selection) and item.num_dropped > 0 for item in items]
    return torch.tensor(selected, device=device) if any(selected) else None


def _pruned(
    items: Sequence[ScheduledSequence], rows: "_Numbers", policies: Mapping[str, KVPolicy]
) -> tuple[PrunedSequence, ...]:
    found = []
    for index, item in enumerate(items):
        policy = policies.get(item.sequence.request.request_id) if policies else None
        if isinstance(policy, Pruner) and (pruning := policy.pruning()) is not None:
            output = int(rows[index]) + max(item.sequence.request.num_prompt_tokens - item.start, 0)
            found.append(PrunedSequence(index, pruning, item.start == 0, output))
    return tuple(found)
