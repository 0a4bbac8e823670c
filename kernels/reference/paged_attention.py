"""Causal attention over a paged KV cache (Kwon et al. 2023, §4.1), one sequence at a time."""

import torch
from torch import Tensor

from kernels.kv_format import KVFormat
from kernels.sinks import Sinks

QUERIES_AT_ONCE = 256
"""Bounds the score matrix: 256 queries × 32 heads × 8192 keys are 256 MiB in float32."""


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Sinks | None = None,
    hidden: Tensor | None = None,
    kv_format: KVFormat | None = None,
) -> Tensor:
    """Attend each query to its own sequence's past, in float32; see `kernels.ops.paged_attention`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for b, length in enumerate(lengths):
        seen, num_sinks = _limits(window, sinks, b, length)
        for first in range(starts[b], starts[b + 1], QUERIES_AT_ONCE):
            last = min(first + QUERIES_AT_ONCE, starts[b + 1])
            stop = length - (starts[b + 1] - last)  # one past the last query's position
            positions = torch.arange(stop - (last - first), stop, device=q.device)
            begin = max(0, stop - (last - first) - seen + 1)
            slots = torch.arange(begin, stop, device=q.device)
            if num_sinks:
                slots = torch.cat([torch.arange(min(num_sinks, begin), device=q.device), slots])
            keys = gather(key_cache, block_tables[b], slots, kv_format)
            values = gather(value_cache, block_tables[b], slots, kv_format)
            if hidden is not None:
                values = values.masked_fill((slots[:, None] < hidden[b]).unsqueeze(-1), 0.0)
            scores = score(q[first:last], keys, scale)
            if sinks is not None and num_sinks:
                at_sinks = score(sinks.q[first:last], keys, scale)
                scores = torch.where(slots < num_sinks, at_sinks, scores)
            distance = positions[:, None] - slots[None, :]
            unseen = (distance < 0) | ((distance >= seen) & (slots >= num_sinks))
            if hidden is not None:
                unseen = unseen | (slots < hidden[b, :, None, None, None])
            weights = probabilities(scores.masked_fill(unseen, float("-inf")))
            out[first:last] = torch.einsum("hgql,lhd->qhgd", weights, values).flatten(1, 2)
    return out


def score(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Each query of q [Q, Hq, D] times each key of its head in keys [L, Hkv, D], float32: [Hkv, Hq/Hkv, Q, L]."""
    grouped = q.to(torch.float32).unflatten(1, (keys.shape[1], q.shape[1] // keys.shape[1]))
    return torch.einsum("qhgd,lhd->hgql", grouped, keys) * scale


def probabilities(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; zeros where every score is −inf."""
    return scores.softmax(dim=-1).nan_to_num(nan=0.0) if scores.isneginf().all(-1).any() else scores.softmax(dim=-1)


def _limits(window: int | None, sinks: Sinks | None, b: int, length: int) -> tuple[int, int]:
    """The narrowest window of sequence b and its sinks; a window that hides nothing is as long as the sequence."""
    own = 0 if sinks is None else int(sinks.windows[b])
    seen = min(window or length, own or length)
    return seen, 0 if sinks is None else int(sinks.counts[b])


def gather(cache: Tensor, table: Tensor, positions: Tensor, kv_format: KVFormat | None = None) -> Tensor:
    """The cached heads at `positions` [L] of one sequence, as float32 [L, Hkv, D]; reads no other slot."""
    block_size = cache.shape[2]
    rows = cache[table[positions // block_size].long(), :, positions % block_size]
    return rows.to(torch.float32) if kv_format is None else kv_format.decode(rows)
