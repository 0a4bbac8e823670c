"""How much attention slots get (H2O, Zhang et al. 2023, §4), summed up over queries without a matrix of probabilities.

A probability needs its row's whole sum. So `sum_rows` first finds that for every row that counts, as attention does but
without values, and `sum_columns` then computes the scores once more, and adds up probabilities slot by slot. Each slot
belongs to one program, which adds in the same order every time: no atomic sums, and the same result whenever it is run.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.counted import Counted
from kernels.kv_format import KVFormat
from kernels.triton.arguments import check_counts, check_mass, check_paged
from kernels.triton.attention_shapes import attention_shapes, counts
from kernels.triton.gpu import GPU, gpu_of
from kernels.triton.launch_table import launch_parameters
from kernels.triton.rows import RowsShape, aligned_rows, num_splits, numbers_of, rows_shape
from kernels.triton.scores import load_queries, score_tile, sequence_of_tile
from kernels.triton.softmax import fold_scores
from kernels.triton.variant import Launch, Value, plan_launch

COUNTS = ("num_sequences", "num_kv_heads", "group", "heads", "table_stride", "num_splits", "num_rows")


@triton.jit(do_not_specialize=COUNTS)
def sum_rows(
    q, key_cache, key_numbers, block_tables, query_start, seq_lens, counted_from, kept, hidden, partial_top,
    scale, q_token, q_head, table_stride, num_sequences, num_kv_heads, group, heads,
    D: tl.constexpr, D0: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    FORMAT: tl.constexpr, CODES: tl.constexpr, CAST_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """The logarithm, to base 2, of each row's sum over the slots of a split. Grid: as `paged_attention.attend`."""
    rows_queries = BLOCK_M // heads
    b = tl.program_id(0)
    if SEARCH:
        b = sequence_of_tile(query_start, tl.program_id(0), rows_queries, num_sequences)
    begin = tl.load(query_start + b)
    count = tl.load(query_start + b + 1) - begin
    counts_from = tl.load(counted_from + b) - begin
    first_query, end_query = 0, count
    if SEARCH:
        first_query = (tl.program_id(0) - begin // rows_queries - b) * rows_queries
        end_query = tl.minimum(first_query + rows_queries, count)
    end_query = tl.where(tl.load(kept + b) >= 0, end_query, 0)
    for first in range(first_query, end_query, rows_queries):
        if first + rows_queries > counts_from:
            row = tl.arange(0, BLOCK_M)
            query = first + row // heads
            head = tl.program_id(1) * heads + row % heads
            real = (row < rows_queries * heads) & (query < count)
            length = tl.load(seq_lens + b)
            stop = tl.minimum(length - count + first + rows_queries, length)
            position = tl.where(real, length - count + query, -1)
            kv_head = tl.program_id(1) * heads // group
            low = 0
            if hidden is not None:
                low = tl.minimum(tl.load(hidden + b * num_kv_heads + kv_head), stop)
            TYPE: tl.constexpr = tl.float16 if CODES else q.dtype.element_ty
            token = (begin + query).to(tl.int64)
            queries = load_queries(q + token * q_token + head * q_head, real, D, D0, P0, P1, FORMAT, TYPE)
            num_tiles = tl.cdiv(stop, TILE) - low // TILE
            per_split = tl.cdiv(num_tiles, tl.num_programs(2))
            first_tile = low // TILE + tl.minimum(tl.program_id(2) * per_split, num_tiles)
            end_tile = tl.minimum(first_tile + per_split, low // TILE + num_tiles)
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            for tile in range(first_tile, end_tile):
                scores, _, _ = score_tile(
                    queries, position, tile * TILE + tl.arange(0, TILE), low, stop, 0, key_cache, key_numbers,
                    block_tables + b.to(tl.int64) * table_stride, kv_head, num_kv_heads,
                    D, D0, P0, P1, W, S, FORMAT, TYPE, CAST_FP8, False, True,
                )  # fmt: skip
                _, top, total, _ = fold_scores(scores, scale, top, total)
            place = (token * (num_kv_heads * group) + head) * tl.num_programs(2) + tl.program_id(2)
            tl.store(partial_top + place, top + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=COUNTS)
def merge_tops(partial_top, top, num_splits, num_rows, BLOCK: tl.constexpr):
    """The logarithm of each row's sum over all splits. Grid: tiles of rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        part = tl.load(partial_top + row * num_splits + split, mask=row < num_rows, other=float("-inf"))
        new_best = tl.maximum(best, part)
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        total = total * tl.exp2(best - base) + tl.exp2(part - base)
        best = new_best
    tl.store(top + row, best + tl.log2(total), mask=row < num_rows)


@triton.jit(do_not_specialize=COUNTS)
def sum_columns(
    q, key_cache, key_numbers, block_tables, query_start, seq_lens, counted_from, kept, hidden, top, mass,
    scale, q_token, q_head, table_stride, num_kv_heads, group, heads,
    D: tl.constexpr, D0: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    FORMAT: tl.constexpr, CODES: tl.constexpr, CAST_FP8: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each slot's probabilities, added to what it keeps. Grid: sequences, KV heads, splits; a split takes every
    ⟨splits⟩th tile, so that all have early slots, which many rows see, and late ones."""
    b, kv_head, split, num_splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    begin = tl.load(query_start + b)
    count = tl.load(query_start + b + 1) - begin
    keeps = tl.load(kept + b)
    length = tl.where((count > 0) & (keeps >= 0), tl.load(seq_lens + b), 0)
    table = block_tables + b.to(tl.int64) * table_stride
    low = 0
    if hidden is not None:
        low = tl.minimum(tl.load(hidden + b * num_kv_heads + kv_head), length)

    for tile in range(split, tl.cdiv(length, TILE), num_splits):
        slot = tile * TILE + tl.arange(0, TILE)
        new = (slot >= keeps) & (slot < length)
        block = tl.load(table + slot // S, mask=new, other=0).to(tl.int64)
        tl.store(mass + (block * num_kv_heads + kv_head) * S + slot % S, tl.zeros([TILE], tl.float32), mask=new)

    TYPE: tl.constexpr = tl.float16 if CODES else q.dtype.element_ty
    row = tl.arange(0, BLOCK_M)
    rows_queries = BLOCK_M // heads
    counts_from = tl.load(counted_from + b) - begin
    for first in range(counts_from, tl.where(length > 0, count, 0), rows_queries):
        for first_head in range(kv_head * group, (kv_head + 1) * group, heads):
            tl.debug_barrier()  # which thread adds to a slot may change from tile to tile
            query = first + row // heads
            head = first_head + row % heads
            real = (row < rows_queries * heads) & (query < count)
            token = (begin + query).to(tl.int64)
            stop = tl.minimum(length - count + first + rows_queries, length)
            position = tl.where(real, length - count + query, -1)
            queries = load_queries(q + token * q_token + head * q_head, real, D, D0, P0, P1, FORMAT, TYPE)
            logs = tl.load(top + token * (num_kv_heads * group) + head, mask=real, other=0.0)
            logs = tl.where(logs == float("-inf"), 0.0, logs)
            skipped = tl.cdiv(tl.maximum(low // TILE - split, 0), num_splits)
            for tile in range(split + skipped * num_splits, tl.cdiv(stop, TILE), num_splits):
                scores, place, inside = score_tile(
                    queries, position, tile * TILE + tl.arange(0, TILE), low, stop, 0, key_cache, key_numbers, table,
                    kv_head, num_kv_heads, D, D0, P0, P1, W, S, FORMAT, TYPE, CAST_FP8, False, True,
                )  # fmt: skip
                sums = tl.sum(tl.exp2(scores * scale - logs[:, None]), 0)
                tl.store(mass + place, tl.load(mass + place, mask=inside, other=0.0) + sums, mask=inside)


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
    gpu: GPU | None = None,
) -> None:
    """See `kernels.ops.attention_mass`; raises ValueError for arguments that do not fit each other."""
    launches = plan(
        q, key_cache, block_tables, query_start, seq_lens, scale, mass, counted, hidden, kv_format,
        gpu or gpu_of(q.device),
    )  # fmt: skip
    for launch in launches:
        launch.run({"sum_rows": sum_rows, "merge_tops": merge_tops, "sum_columns": sum_columns}[launch.function])


def plan(
    q: Tensor,
    key_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    mass: Tensor,
    counted: Counted,
    hidden: Tensor | None,
    kv_format: KVFormat | None,
    gpu: GPU,
) -> list[Launch]:
    """`sum_rows`, `merge_tops` if the keys are split, `sum_columns`."""
    check_paged(q, key_cache, block_tables, query_start, seq_lens, hidden, kv_format)
    check_mass(mass, key_cache)
    check_counts(counted.first, len(seq_lens))
    check_counts(counted.kept, len(seq_lens))
    if not len(q) or not len(seq_lens):
        return []
    shape = rows_shape(q, key_cache, len(seq_lens), kv_format, gpu)
    splits = num_splits(shape, gpu, q.shape[1], block_tables.shape[1] * key_cache.shape[2])
    tops = torch.empty((q.shape[0], q.shape[1], splits), dtype=torch.float32, device=q.device)
    merged = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if splits > 1 else tops
    rows = aligned_rows(q)
    values: dict[str, Value] = {
        "q": rows,
        "key_cache": key_cache,
        "key_numbers": numbers_of(key_cache, shape.format),
        "block_tables": block_tables,
        "query_start": query_start,
        "seq_lens": seq_lens,
        "counted_from": counted.first,
        "kept": counted.kept,
        "hidden": hidden,
        "scale": scale * math.log2(math.e),
        "q_token": rows.stride(0),
        "q_head": rows.stride(1),
        "table_stride": block_tables.stride(0),
        "num_kv_heads": key_cache.shape[1],
        "group": q.shape[1] // key_cache.shape[1],
        "heads": shape.heads,
    }
    first = _plan_rows(shape, q.shape[1], splits, {**values, "partial_top": tops, "num_sequences": len(seq_lens)})
    last = _plan_columns(shape, gpu, block_tables, key_cache, {**values, "top": merged, "mass": mass})
    return [first, *([_plan_merge(tops, merged, gpu)] if splits > 1 else []), last]


def _plan_rows(shape: RowsShape, q_heads: int, splits: int, values: dict[str, Value]) -> Launch:
    return plan_launch(
        "attention_mass.sum_rows",
        (shape.tiles, q_heads // shape.heads, splits),
        values,
        shape.constants,
        counts=COUNTS,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        tensor_cores=not shape.single_precision,
    )


def _plan_merge(tops: Tensor, merged: Tensor, gpu: GPU) -> Launch:
    parameters = launch_parameters("attention_mass.merge_tops", gpu, "any")
    return plan_launch(
        "attention_mass.merge_tops",
        (triton.cdiv(merged.numel(), parameters["block"]), 1, 1),
        {"partial_top": tops, "top": merged, "num_splits": tops.shape[2], "num_rows": merged.numel()},
        {"BLOCK": parameters["block"]},
        counts=COUNTS,
        num_warps=parameters["num_warps"],
        num_stages=parameters["num_stages"],
        tensor_cores=False,
    )


def _plan_columns(
    shape: RowsShape, gpu: GPU, block_tables: Tensor, key_cache: Tensor, values: dict[str, Value]
) -> Launch:
    """Two programs for each multiprocessor, if the longest table has as many tiles."""
    sequences, kv_heads = len(block_tables), key_cache.shape[1]
    tiles = triton.cdiv(block_tables.shape[1] * key_cache.shape[2], shape.tile)
    splits = max(1, min(triton.cdiv(2 * gpu.num_multiprocessors, sequences * kv_heads), tiles))
    return plan_launch(
        "attention_mass.sum_columns",
        (sequences, kv_heads, splits),
        values,
        {name: value for name, value in shape.constants.items() if name != "SEARCH"},
        counts=COUNTS,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        tensor_cores=not shape.single_precision,
    )


def declared(gpu: GPU) -> Iterator[tuple[str, list[Launch]]]:
    """Each shape's launches; see `kernels/triton/registry.py`."""
    for shape in attention_shapes():
        if shape.limits in ("", "hidden"):
            q, cache, tables, starts, lengths = shape.tensors()
            mass = torch.empty(cache.shape[:3], dtype=torch.float32, device="meta")
            counted = Counted(counts(len(lengths)), counts(len(lengths)))
            arguments = mass, counted, shape.hidden(), shape.kv_format
            yield shape.name, plan(q, cache, tables, starts, lengths, 0.125, *arguments, gpu)
