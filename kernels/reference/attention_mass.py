"""How much attention each slot of the paged cache gets, summed up over queries (H2O, Zhang et al. 2023, §4)."""

import torch
from torch import Tensor

from kernels.counted import Counted
from kernels.kv_format import KVFormat
from kernels.reference.paged_attention import QUERIES_AT_ONCE, gather, probabilities, score


def attention_mass(
    q: Tensor,
    key_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    mass: Tensor,
    counted: Counted,
    hidden: Tensor | None = None,
    kv_format: KVFormat | None = None,
) -> None:
    """Sum up the probabilities of the queries that count; see `kernels.ops.attention_mass`."""
    block_size = key_cache.shape[2]
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    counted_from = counted.first.tolist()
    for b, kept in enumerate(counted.kept.tolist()):
        if kept < 0 or starts[b] == starts[b + 1]:
            continue
        slots = torch.arange(lengths[b], device=q.device)
        blocks, offsets = block_tables[b, slots // block_size].long(), slots % block_size
        keys = gather(key_cache, block_tables[b], slots, kv_format)
        sums = mass[blocks, :, offsets]
        sums[kept:] = 0
        for first in range(counted_from[b], starts[b + 1], QUERIES_AT_ONCE):
            last = min(first + QUERIES_AT_ONCE, starts[b + 1])
            positions = lengths[b] - starts[b + 1] + torch.arange(first, last, device=q.device)
            unseen = slots > positions[:, None]
            if hidden is not None:
                unseen = unseen | (slots < hidden[b, :, None, None, None])
            scores = score(q[first:last], keys, scale).masked_fill(unseen, float("-inf"))
            sums += probabilities(scores).sum((1, 2)).T
        mass[blocks, :, offsets] = sums
