"""Attention of one sequence with SpAtten's pruning (Wang et al. 2021, §3.3 and §3.4)."""

import torch
from torch import Tensor

from kernels.kv_format import KVFormat
from kernels.pruning import Pruning
from kernels.reference.paged_attention import QUERIES_AT_ONCE, gather, probabilities, score


def pruned_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_len: int,
    scale: float,
    hidden: Tensor | None,
    pruning: Pruning,
    first_output: int,
    kv_format: KVFormat | None = None,
) -> Tensor:
    """Attend in float32, with less than all of it; see `kernels.ops.pruned_attention`."""
    slots = torch.arange(seq_len, device=q.device)
    keys, values = (gather(cache, block_table, slots, kv_format) for cache in (key_cache, value_cache))
    unseen = torch.zeros(key_cache.shape[1], 1, 1, seq_len, dtype=torch.bool, device=q.device)
    if hidden is not None:
        unseen = (slots < hidden[:, None])[:, None, None]
        keys, values = (x.masked_fill(unseen[:, 0, 0].T.unsqueeze(-1), 0.0) for x in (keys, values))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for first in range(0, len(q), QUERIES_AT_ONCE):
        last = min(first + QUERIES_AT_ONCE, len(q))
        positions = torch.arange(seq_len - len(q) + first, seq_len - len(q) + last, device=q.device)
        hides = unseen | (slots > positions[:, None])
        weights = probabilities(score(q[first:last], keys, scale).masked_fill(hides, float("-inf")))
        begin = max(first_output, first)
        if pruning.high_bits and begin < last:
            part = slice(begin - first, None)
            weights[:, :, part] = _progressive(q[begin:last], keys, scale, hides[:, :, part], pruning)
        weights = _without_smallest(weights, ~hides, pruning.values)
        out[first:last] = torch.einsum("hgql,lhd->qhgd", weights, values).flatten(1, 2)
    return out


def _progressive(q: Tensor, keys: Tensor, scale: float, hides: Tensor, pruning: Pruning) -> Tensor:
    """Probabilities from the high bits of queries and keys; where a row is flat, from all of them."""
    bits = pruning.high_bits + pruning.low_bits

    def at(low_bits_left_out: int) -> Tensor:
        rows, others = (_quantized(x, bits, low_bits_left_out) for x in (q.to(torch.float32), keys))
        return probabilities(score(rows, others, scale).masked_fill(hides, float("-inf")))

    high = at(pruning.low_bits)
    flat = high.amax(-1, keepdim=True) < pruning.threshold
    return torch.where(flat, at(0), high) if pruning.low_bits and flat.any() else high


def _quantized(x: Tensor, bits: int, left_out: int) -> Tensor:
    """x to so many bits, symmetric for each token and head, of which the lowest are left out as if they were half."""
    largest = (1 << (bits - 1)) - 1
    step = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
    codes = (x / step).round()
    kept = 1 << left_out
    return step * (codes if left_out == 0 else (codes.floor_divide(kept) + 0.5) * kept)


def _without_smallest(weights: Tensor, seen: Tensor, share: float) -> Tensor:
    """``weights`` [Hkv, G, Q, L], with 0 for the given share of those that are ``seen``, the smallest of each row."""
    if share == 0:
        return weights
    gone = (seen.sum(-1, keepdim=True) * share).floor()
    ranks = weights.masked_fill(~seen, -1.0).argsort(dim=-1, stable=True).argsort(dim=-1)
    ranks = ranks - (~seen).sum(-1, keepdim=True)  # those that are not seen rank below
    return weights.masked_fill(ranks < gone, 0.0)
