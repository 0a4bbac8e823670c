"""How much attention each slot of the paged cache gets, summed up over queries (H2O, Zhang et al. 2023, §4)."""

import torch
from torch import Tensor

from kernels.kv_format import KVFormat
from kernels.reference.paged_attention import QUERIES_AT_ONCE, gather, score


def attention_mass(
    q: Tensor,
    key_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    mass: Tensor,
    counted: Tensor,
    kv_format: KVFormat | None = None,
) -> None:
    """Sum up the probabilities of the queries that count; see `kernels.ops.attention_mass`."""
    block_size = key_cache.shape[2]
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for b in counted.nonzero().flatten().tolist():
        slots = torch.arange(lengths[b], device=q.device)
        blocks, offsets = block_tables[b, slots // block_size].long(), slots % block_size
        keys = gather(key_cache, block_tables[b], slots, kv_format)
        queries, last_only = starts[b + 1] - starts[b], counted[b] == 2
        if not queries:
            continue
        sums = mass[blocks, :, offsets]
        sums[0 if last_only else lengths[b] - queries :] = 0
        for first in range(queries - 1 if last_only else 0, queries, QUERIES_AT_ONCE):
            last = min(first + QUERIES_AT_ONCE, queries)
            positions = lengths[b] - queries + torch.arange(first, last, device=q.device)
            scores = score(q[starts[b] + first : starts[b] + last], keys, scale)
            scores = scores.masked_fill_(slots > positions[:, None], float("-inf"))
            sums += scores.softmax(dim=-1).sum((1, 2)).T
        mass[blocks, :, offsets] = sums
