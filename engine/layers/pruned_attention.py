"""Attention of sequences whose policy prunes within it (SpAtten, Wang et al. 2021)."""

from torch import Tensor

from engine.forward_batch import ForwardBatch
from engine.kv_cache import LayerCache
from kernels import ops


def prune(
    attended: Tensor, query: Tensor, batch: ForwardBatch, cache: LayerCache, scale: float, hidden: Tensor | None
) -> None:
    """Replace those sequences' rows of ``attended`` [T, Hq, D], and sum up how much each KV head gave (§3.2).

    query [T, Hq, D] is rotated; ``hidden`` as for `ops.paged_attention`.
    """
    starts, num_kv_heads = batch.query_start.tolist(), cache.key.shape[1]
    for one in batch.pruned:
        rows = slice(starts[one.index], starts[one.index + 1])
        if one.pruning.values or one.pruning.high_bits:
            attended[rows] = ops.pruned_attention(
                query[rows],
                cache.key,
                cache.value,
                batch.block_tables[one.index],
                int(batch.seq_lens[one.index]),
                scale,
                None if hidden is None else hidden[one.index],
                one.pruning,
                one.first_output - rows.start,
                cache.kv_format,
            )
        given = attended[rows].float().abs().unflatten(1, (num_kv_heads, -1)).sum((0, 2, 3))
        first_block = batch.block_tables[one.index, 0]
        cache.output[first_block] = given if one.begins else cache.output[first_block] + given
