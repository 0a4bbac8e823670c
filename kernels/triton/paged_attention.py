"""Causal attention over the paged cache, split over keys where there are few queries (Flash-Decoding, Dao et al. 2023).

A program takes a tile of rows of one sequence. A row is a query of one head; all heads of the tile read the same KV
head, so that its keys are read once for all of them (grouped queries packed into the rows of a matrix product). It
walks over the sequence's slots, a tile at a time, wherever the block table says that they lie.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_format import KVFormat
from kernels.sinks import Sinks
from kernels.triton.arguments import check_paged, check_sinks
from kernels.triton.attention_shapes import attention_shapes
from kernels.triton.gpu import GPU, gpu_of
from kernels.triton.kv_rows import load_codes, load_scales
from kernels.triton.launch_table import launch_parameters
from kernels.triton.rows import aligned_rows, num_splits, numbers_of, rows_shape
from kernels.triton.scores import load_queries, score_tile, sequence_of_tile
from kernels.triton.softmax import fold_scores
from kernels.triton.variant import Launch, plan_launch

COUNTS = ("num_sequences", "num_kv_heads", "group", "heads", "window", "table_stride")

NO_WINDOW = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=COUNTS)
def attend(
    q, sink_q, key_cache, value_cache, key_numbers, value_numbers,
    block_tables, query_start, seq_lens, windows, sink_counts, hidden, out, partial_out, partial_top,
    scale, q_token, q_head, sink_token, sink_head, table_stride,
    num_sequences, num_kv_heads, group, heads, window,
    D: tl.constexpr, D0: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    FORMAT: tl.constexpr, CODES: tl.constexpr, CAST_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, SEARCH: tl.constexpr, WHOLE_TILES: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows, query heads / ``heads``, splits.

    Without SEARCH there is a program for each sequence, which takes all of its rows; with SEARCH one for each tile,
    ⌊T / rows of a tile⌋ + B of them, which is enough however the rows are shared out. WHOLE_TILES: tiles that every
    row sees all of have a loop of their own, without masks. CODES are multiplied as float16, which holds them exactly.
    """
    rows_queries = BLOCK_M // heads
    if SEARCH:
        tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late rows see most: the longest programs begin first
        b = sequence_of_tile(query_start, tile, rows_queries, num_sequences)
    else:
        b = tl.program_id(0)
    begin = tl.load(query_start + b)
    count = tl.load(query_start + b + 1) - begin
    if SEARCH:  # no loop: it costs prefill 45 registers a thread, for addresses that outlive a tile
        first = (tile - begin // rows_queries - b) * rows_queries
        if first < count:
            attend_rows(
                q, sink_q, key_cache, value_cache, key_numbers, value_numbers,
                block_tables, seq_lens, windows, sink_counts, hidden, out, partial_out, partial_top,
                scale, q_token, q_head, sink_token, sink_head, table_stride,
                num_kv_heads, group, heads, window, b, begin, count, first,
                D, D0, P0, P1, W, S, FORMAT, CODES, CAST_FP8, BLOCK_M, TILE, WHOLE_TILES, WINDOWED,
            )  # fmt: skip
    else:
        for first in range(0, count, rows_queries):
            attend_rows(
                q, sink_q, key_cache, value_cache, key_numbers, value_numbers,
                block_tables, seq_lens, windows, sink_counts, hidden, out, partial_out, partial_top,
                scale, q_token, q_head, sink_token, sink_head, table_stride,
                num_kv_heads, group, heads, window, b, begin, count, first,
                D, D0, P0, P1, W, S, FORMAT, CODES, CAST_FP8, BLOCK_M, TILE, WHOLE_TILES, WINDOWED,
            )  # fmt: skip


@triton.jit
def attend_rows(
    q, sink_q, key_cache, value_cache, key_numbers, value_numbers,
    block_tables, seq_lens, windows, sink_counts, hidden, out, partial_out, partial_top,
    scale, q_token, q_head, sink_token, sink_head, table_stride,
    num_kv_heads, group, heads, window, b, begin, count, first,
    D: tl.constexpr, D0: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    FORMAT: tl.constexpr, CODES: tl.constexpr, CAST_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, WHOLE_TILES: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """One tile of rows: the queries of sequence b from its ``first`` on, as many as there is room for."""
    TYPE: tl.constexpr = tl.float16 if CODES else q.dtype.element_ty
    row = tl.arange(0, BLOCK_M)
    rows_queries = BLOCK_M // heads
    head = tl.program_id(1) * heads + row % heads
    kv_head = tl.program_id(1) * heads // group
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    caches = (key_cache, value_cache, key_numbers, value_numbers)
    length = tl.load(seq_lens + b)
    table = block_tables + b.to(tl.int64) * table_stride
    query = first + row // heads
    real = (row < rows_queries * heads) & (query < count)
    token = (begin + query).to(tl.int64)
    lowest = length - count + first
    stop = tl.minimum(lowest + rows_queries, length)
    position = tl.where(real, length - count + query, -1)
    low = 0
    if hidden is not None:
        low = tl.minimum(tl.load(hidden + b * num_kv_heads + kv_head), stop)
    reach = window
    window_low = low
    if WINDOWED:
        if windows is not None:
            own = tl.load(windows + b)
            reach = tl.where(own > 0, tl.minimum(own, window), window)
        window_low = tl.maximum(low, lowest - reach + 1)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    least = tl.zeros([BLOCK_M], tl.float32)
    sums0 = tl.zeros([BLOCK_M, P0], tl.float32)
    sums1 = tl.zeros([BLOCK_M, P1 if P1 > 0 else 16], tl.float32)
    state = (top, total, least, sums0, sums1)

    if sink_q is not None:
        sinks = tl.minimum(tl.load(sink_counts + b), stop)
        window_low = tl.maximum(window_low, sinks)
        if split == 0 and sinks > 0:
            sink_rows = sink_q + token * sink_token + head * sink_head
            queries = load_queries(sink_rows, real, D, D0, P0, P1, FORMAT, TYPE)
            state = fold_tiles(
                state, queries, position, 0, tl.cdiv(sinks, TILE), low, sinks, NO_WINDOW, caches, table, kv_head,
                num_kv_heads, scale, D, D0, P0, P1, W, S, FORMAT, TYPE, CAST_FP8, TILE, False, True,
            )  # fmt: skip

    base = window_low // TILE
    num_tiles = tl.cdiv(stop, TILE) - base
    per_split = tl.cdiv(num_tiles, num_splits)
    first_tile = base + tl.minimum(split * per_split, num_tiles)
    end_tile = tl.minimum(first_tile + per_split, base + num_tiles)
    queries = load_queries(q + token * q_token + head * q_head, real, D, D0, P0, P1, FORMAT, TYPE)
    if WHOLE_TILES:
        first_whole = first_tile
        if WINDOWED or hidden is not None:
            whole_low = tl.maximum(window_low, stop - reach)
            first_whole = tl.minimum(tl.maximum(tl.cdiv(whole_low, TILE), first_tile), end_tile)
            state = fold_tiles(
                state, queries, position, first_tile, first_whole, window_low, stop, reach, caches, table, kv_head,
                num_kv_heads, scale, D, D0, P0, P1, W, S, FORMAT, TYPE, CAST_FP8, TILE, WINDOWED, True,
            )  # fmt: skip
        first_tile = tl.maximum(tl.minimum((lowest + 1) // TILE, end_tile), first_whole)
        state = fold_tiles(
            state, queries, position, first_whole, first_tile, window_low, stop, reach, caches, table, kv_head,
            num_kv_heads, scale, D, D0, P0, P1, W, S, FORMAT, TYPE, CAST_FP8, TILE, False, False,
        )  # fmt: skip
    state = fold_tiles(
        state, queries, position, first_tile, end_tile, window_low, stop, reach, caches, table, kv_head,
        num_kv_heads, scale, D, D0, P0, P1, W, S, FORMAT, TYPE, CAST_FP8, TILE, WINDOWED, True,
    )  # fmt: skip

    top, total, least, sums0, sums1 = state
    share = 1.0 / tl.where(total > 0.0, total, 1.0)
    if FORMAT == "int8" or FORMAT == "int4":
        sums0 += least[:, None]
        sums1 += least[:, None]
    place = token * (num_kv_heads * group) + head
    if partial_out is None:
        target = out + place * D
    else:
        place = place * num_splits + split
        target = partial_out + place * D
        tl.store(partial_top + place, top + tl.log2(total), mask=real)
    store_part(target, sums0 * share[:, None], real, D0, P0)
    if P1 > 0:
        store_part(target + D0, sums1 * share[:, None], real, D - D0, P1)


@triton.jit
def fold_tiles(
    state, queries, position, first, end, low, stop, reach, caches, table, kv_head, num_kv_heads, scale,
    D: tl.constexpr, D0: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    FORMAT: tl.constexpr, TYPE: tl.constexpr, CAST_FP8: tl.constexpr,
    TILE: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to the tiles from ``first`` up to ``end``; if MASKED, to slots from ``low`` up to ``stop`` only."""
    key_cache, value_cache, key_numbers, value_numbers = caches
    for tile in range(first, end):
        top, total, least, sums0, sums1 = state
        slot = tile * TILE + tl.arange(0, TILE)
        scores, row, inside = score_tile(
            queries, position, slot, low, stop, reach, key_cache, key_numbers, table, kv_head, num_kv_heads,
            D, D0, P0, P1, W, S, FORMAT, TYPE, CAST_FP8, WINDOWED, MASKED,
        )  # fmt: skip
        powers, top, total, shrink = fold_scores(scores, scale, top, total)

        v0, v1 = load_codes(value_cache, row, inside, D, D0, P0, P1, W, FORMAT, TYPE, CAST_FP8, MASKED)
        if FORMAT == "plain":
            weights = powers.to(TYPE)
            sums0 = tl.dot(weights, v0, sums0 * shrink[:, None], input_precision="ieee")
            if P1 > 0:
                sums1 = tl.dot(weights, v1, sums1 * shrink[:, None], input_precision="ieee")
        else:
            v_scale, v_least = load_scales(value_numbers, row, inside, D, W, FORMAT, CAST_FP8, MASKED)
            if FORMAT != "fp8":
                least = least * shrink + tl.sum(powers * v_least[None, :], 1)
            largest = tl.max(v_scale, 0)  # so that float16 holds the products: scales can be as small as its least
            largest = tl.where(largest > 0.0, largest, 1.0)
            weights = (powers * (v_scale / largest)[None, :]).to(TYPE)
            sums0 = sums0 * shrink[:, None] + tl.dot(weights, v0, input_precision="ieee") * largest
            if P1 > 0:
                sums1 = sums1 * shrink[:, None] + tl.dot(weights, v1, input_precision="ieee") * largest
        state = (top, total, least, sums0, sums1)
    return state


@triton.jit
def store_part(start, x, real, WIDTH: tl.constexpr, P: tl.constexpr):
    """Rows x [M, P] to where they begin, ``start`` [M]."""
    offsets = tl.arange(0, P)
    tl.store(
        start[:, None] + offsets[None, :], x.to(start.dtype.element_ty), mask=real[:, None] & (offsets < WIDTH)[None, :]
    )


@triton.jit
def merge(partial_out, partial_top, out, num_splits, D: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr):
    """One row's splits, weighted by the softmax of their tops. Grid: T · Hq rows."""
    row = tl.program_id(0).to(tl.int64)
    offsets, chunk = tl.arange(0, P), tl.arange(0, CHUNK)
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    sums = tl.zeros([P], tl.float32)
    for first in range(0, num_splits, CHUNK):
        split = row * num_splits + first + chunk
        tops = tl.load(partial_top + split, mask=first + chunk < num_splits, other=float("-inf"))
        used = tops > float("-inf")
        new_best = tl.maximum(best, tl.max(tops, 0))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(tops - base)
        inside = used[:, None] & (offsets < D)[None, :]
        parts = tl.load(partial_out + split[:, None] * D + offsets[None, :], mask=inside, other=0.0)
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(weights, 0)
        sums = sums * shrink + tl.sum(parts * weights[:, None], 0)
        best = new_best
    sums /= tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * D + offsets, sums.to(out.dtype.element_ty), mask=offsets < D)


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
    gpu: GPU | None = None,
) -> Tensor:
    """See `kernels.ops.paged_attention`; raises ValueError for arguments that do not fit each other.

    The host reads no tensor, so a block that does not exist is not noticed. scale must be positive.
    """
    out, launches = plan(
        q, key_cache, value_cache, block_tables, query_start, seq_lens, scale, window, sinks, hidden, kv_format,
        gpu or gpu_of(q.device),
    )  # fmt: skip
    for launch, kernel in zip(launches, (attend, merge), strict=False):
        launch.run(kernel)
    return out


def plan(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int | None,
    sinks: Sinks | None,
    hidden: Tensor | None,
    kv_format: KVFormat | None,
    gpu: GPU,
) -> tuple[Tensor, list[Launch]]:
    """The output, and what fills it: `attend`, and `merge` if the keys are split."""
    check_paged(q, key_cache, block_tables, query_start, seq_lens, hidden, kv_format, value_cache=value_cache)
    check_sinks(sinks, q, len(seq_lens))
    tokens, q_heads, dims = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens or not len(seq_lens):
        return out, []
    kv_heads, group = key_cache.shape[1], q_heads // key_cache.shape[1]
    shape = rows_shape(q, key_cache, len(seq_lens), kv_format, gpu)
    splits = num_splits(shape, gpu, q_heads, block_tables.shape[1] * key_cache.shape[2])
    parts = None
    if splits > 1:
        sums = torch.empty((tokens, q_heads, splits, dims), dtype=torch.float32, device=q.device)
        parts = sums, torch.empty((tokens, q_heads, splits), dtype=torch.float32, device=q.device)
    rows = aligned_rows(q)
    sink_rows = None if sinks is None else aligned_rows(sinks.q)
    values = {
        "q": rows,
        "sink_q": sink_rows,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "key_numbers": numbers_of(key_cache, shape.format),
        "value_numbers": numbers_of(value_cache, shape.format),
        "block_tables": block_tables,
        "query_start": query_start,
        "seq_lens": seq_lens,
        "windows": None if sinks is None else sinks.windows,
        "sink_counts": None if sinks is None else sinks.counts,
        "hidden": hidden,
        "out": out,
        "partial_out": None if parts is None else parts[0],
        "partial_top": None if parts is None else parts[1],
        "scale": scale * math.log2(math.e),
        "q_token": rows.stride(0),
        "q_head": rows.stride(1),
        "sink_token": None if sink_rows is None else sink_rows.stride(0),
        "sink_head": None if sink_rows is None else sink_rows.stride(1),
        "table_stride": block_tables.stride(0),
        "num_sequences": len(seq_lens),
        "num_kv_heads": kv_heads,
        "group": group,
        "heads": shape.heads,
        "window": NO_WINDOW.value if window is None else window,
    }
    limits = {"WHOLE_TILES": shape.kind == "prefill", "WINDOWED": window is not None or sinks is not None}
    launches = [
        plan_launch(
            "paged_attention.attend",
            (shape.tiles, q_heads // shape.heads, splits),
            values,
            {**shape.constants, **limits},
            counts=COUNTS,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
            tensor_cores=not shape.single_precision,
        )
    ]
    if parts is not None:
        launches.append(_plan_merge(*parts, out, gpu))
    return out, launches


def _plan_merge(partial_out: Tensor, partial_top: Tensor, out: Tensor, gpu: GPU) -> Launch:
    tokens, heads, dims = out.shape
    parameters = launch_parameters("paged_attention.merge", gpu, "any")
    return plan_launch(
        "paged_attention.merge",
        (tokens * heads, 1, 1),
        {"partial_out": partial_out, "partial_top": partial_top, "out": out, "num_splits": partial_top.shape[2]},
        {"D": dims, "P": triton.next_power_of_2(dims), "CHUNK": parameters["chunk"]},
        counts=("num_splits",),
        num_warps=parameters["num_warps"],
        num_stages=parameters["num_stages"],
        tensor_cores=False,
    )


def declared(gpu: GPU) -> Iterator[tuple[str, list[Launch]]]:
    """Each shape's launches; see `kernels/triton/registry.py`."""
    for shape in attention_shapes():
        q, cache, tables, starts, lengths = shape.tensors()
        limits = shape.window(), shape.sinks(), shape.hidden()
        yield shape.name, plan(q, cache, cache, tables, starts, lengths, 0.125, *limits, shape.kv_format, gpu)[1]
