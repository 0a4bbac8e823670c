"""Scores of a tile of rows at a tile of slots: what attention and its sums over queries have in common."""

import triton
import triton.language as tl

from kernels.triton.kv_rows import load_codes, load_scales


@triton.jit
def score_tile(
    queries, position, slot, low, stop, reach, cache, numbers, table, kv_head, num_kv_heads,
    D: tl.constexpr, D0: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    FORMAT: tl.constexpr, TYPE: tl.constexpr, CAST_FP8: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Queries, as `load_queries` gives them, at ``position`` [M] times the keys of ``slot`` [N], not yet scaled.

    If MASKED, slots from ``low`` up to ``stop`` are read, and -inf is the score of those that a row does not see: later
    ones, and if WINDOWED those ``reach`` or more before it. Returns scores float32 [M, N], the slots' rows of the
    caches int64 [N], and which slots were read.
    """
    q0, q1, q_sum = queries
    inside = (slot >= low) & (slot < stop)
    block = tl.load(table + slot // S, mask=inside, other=0) if MASKED else tl.load(table + slot // S)
    row = (block.to(tl.int64) * num_kv_heads + kv_head) * S + slot % S
    k0, k1 = load_codes(cache, row, inside, D, D0, P0, P1, W, FORMAT, TYPE, CAST_FP8, MASKED)
    scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if P1 > 0:
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
    if FORMAT != "plain":
        scale, least = load_scales(numbers, row, inside, D, W, FORMAT, CAST_FP8, MASKED)
        scores = scores * scale[None, :]
        if FORMAT != "fp8":
            scores += q_sum[:, None] * least[None, :]
    if MASKED:
        seen = inside[None, :] & (slot[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (position[:, None] - slot[None, :] < reach)
        scores = tl.where(seen, scores, float("-inf"))
    return scores, row, inside


@triton.jit
def load_queries(
    start, real,
    D: tl.constexpr, D0: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, FORMAT: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Both parts of the rows that begin at ``start`` [M], as TYPE, zeros where they are not real; and their sums."""
    offsets0 = tl.arange(0, P0)
    q0 = tl.load(start[:, None] + offsets0[None, :], mask=real[:, None] & (offsets0 < D0)[None, :], other=0.0)
    q_sum = tl.sum(q0.to(tl.float32), 1)
    q1 = q0
    if P1 > 0:
        offsets1 = tl.arange(0, P1)
        inside = real[:, None] & (offsets1 < D - D0)[None, :]
        q1 = tl.load(start[:, None] + D0 + offsets1[None, :], mask=inside, other=0.0)
        q_sum += tl.sum(q1.to(tl.float32), 1)
    return q0.to(TYPE), q1.to(TYPE), q_sum


@triton.jit
def sequence_of_tile(query_start, tile, rows_queries, num_sequences):
    """The last sequence b whose tiles begin at or before this one, ⌊query_start[b] / rows_queries⌋ + b."""
    left, right = 0, num_sequences
    while left < right:
        middle = (left + right) // 2
        if tl.load(query_start + middle) // rows_queries + middle <= tile:
            left = middle + 1
        else:
            right = middle
    return left - 1
