"""Causal attention over a paged KV cache (Kwon et al. 2023, §4.1), one sequence at a time."""

import torch
from torch import Tensor

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
) -> Tensor:
    """Attend each query to its own sequence's past, in float32; see `kernels.ops.paged_attention`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for b, length in enumerate(lengths):
        for first in range(starts[b], starts[b + 1], QUERIES_AT_ONCE):
            last = min(first + QUERIES_AT_ONCE, starts[b + 1])
            stop = length - (starts[b + 1] - last)  # one past the last query's position
            positions = torch.arange(stop - (last - first), stop, device=q.device)
            begin = 0 if window is None else max(0, stop - (last - first) - window + 1)
            slots = torch.arange(begin, stop, device=q.device)
            keys = _gather(key_cache, block_tables[b], slots)
            values = _gather(value_cache, block_tables[b], slots)
            out[first:last] = _attend(q[first:last], keys, values, positions, slots, scale, window)
    return out


def _gather(cache: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """The cached heads at `positions` [L] of one sequence, as float32 [L, Hkv, D]; reads no other slot."""
    block_size = cache.shape[2]
    return cache[table[positions // block_size].long(), :, positions % block_size].to(torch.float32)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, key_positions: Tensor, scale: float, window: int | None
) -> Tensor:
    """Masked softmax attention of q [Q, Hq, D] over keys and values [L, Hkv, D]: float32 [Q, Hq, D]."""
    group = q.shape[1] // keys.shape[1]
    grouped = q.to(torch.float32).unflatten(1, (keys.shape[1], group))
    scores = torch.einsum("qhgd,lhd->hgql", grouped, keys) * scale
    distance = positions[:, None] - key_positions[None, :]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    probabilities = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hgql,lhd->qhgd", probabilities, values).flatten(1, 2)
