"""Paged attention: the reference equals torch's, native code equals the reference, and neither reads poisoned slots."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.cpu.native import NativeOps
from kernels.kv_format import FORMATS
from kernels.reference.paged_attention import paged_attention
from kernels.sinks import Sinks
from tests.kernels.attention_cases import AttentionCase, make_case, random_case


def contiguous_attention(case: AttentionCase) -> Tensor:
    """torch's own attention, sequence by sequence, over the keys and values that a query may see, gathered one by one.

    What sinks meet other queries with is a second bias to the scores: q'·k - q·k, as torch adds a float mask to them.
    """
    outputs = []
    block_size = case.key_cache.shape[2]
    starts = case.query_start.tolist()
    for b, length in enumerate(case.seq_lens.tolist()):
        rows = slice(starts[b], starts[b + 1])
        queries = case.q[rows].transpose(0, 1)
        if queries.shape[1] == 0:
            continue
        window, num_sinks = case.limits(b)
        first = max(0, length - queries.shape[1] - window + 1)
        positions = torch.tensor(sorted({*range(min(num_sinks, length)), *range(first, length)}))
        slots = [(int(case.block_tables[b, j // block_size]), int(j % block_size)) for j in positions]
        keys, values = (
            torch.stack([cache[block, :, offset] for block, offset in slots], dim=1)
            for cache in (case.key_cache, case.value_cache)
        )
        distance = torch.arange(length - queries.shape[1], length)[:, None] - positions[None]
        visible = (distance >= 0) & ((distance < window) | (positions < num_sinks))
        bias = torch.zeros(queries.shape[0], *visible.shape)
        if case.sinks is not None:
            change = (case.sinks.q[rows].transpose(0, 1) - queries) * case.scale
            group = queries.shape[0] // keys.shape[0]
            bias += (change @ keys.repeat_interleave(group, 0).mT) * (positions < num_sinks)
        outputs.append(
            scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=bias.masked_fill(~visible, -torch.inf),
                scale=case.scale,
                enable_gqa=True,
            ).transpose(0, 1)
        )
    return torch.cat(outputs) if outputs else case.q.clone()


def assert_equals_reference(actual: Tensor, case: AttentionCase, float32_tolerance: float = 1e-5) -> None:
    """Within 1e-5 in float32; in bfloat16 within the rounding of probabilities and output, 2^-8 of Σ p·|v| each.

    Twice that where what was decoded may be rounded to bfloat16 too, keys and values each.
    """
    exact = case.in_float32()
    expected = paged_attention(*exact.arguments())
    assert actual.shape == case.q.shape
    assert actual.is_contiguous()
    assert actual.dtype == case.q.dtype
    assert not actual.isnan().any()
    if case.q.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=float32_tolerance, atol=float32_tolerance)
    else:
        scale = paged_attention(*exact.with_absolute_values().arguments())
        error = (actual.float() - expected).abs()
        bound = 2**-7 if case.kv_format is None else 2**-6
        assert (error <= bound * scale + 1e-5).all(), (error / scale).max()


def test_the_reference_equals_torch_on_gathered_tensors(rng: random.Random) -> None:
    for _ in range(4):
        case = random_case(rng, torch.float32)
        expected = contiguous_attention(case.in_float32())
        torch.testing.assert_close(paged_attention(*case.arguments()), expected, rtol=1e-5, atol=1e-5)


def test_the_reference_bounds_its_score_matrix_without_changing_the_result() -> None:
    case = make_case([(700, 710)], kv_heads=1, group=1, dims=16)
    torch.testing.assert_close(paged_attention(*case.arguments()), contiguous_attention(case), rtol=1e-5, atol=1e-5)


def test_native_equals_the_reference_on_odd_shapes(ops: NativeOps, dtype: torch.dtype, rng: random.Random) -> None:
    for _ in range(5):
        case = random_case(rng, dtype)
        assert_equals_reference(ops.paged_attention(*case.arguments()), case)


@pytest.mark.parametrize("dims", [2, 16, 32, 64, 80, 96, 128, 256])
def test_every_head_dimension(ops: NativeOps, dtype: torch.dtype, dims: int) -> None:
    case = make_case([(1, 70), (20, 20)], dims=dims, dtype=dtype)
    assert_equals_reference(ops.paged_attention(*case.arguments()), case)


@pytest.mark.parametrize("dims", [2, 64, 130])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_the_cache(ops: NativeOps, dtype: torch.dtype, name: str, dims: int) -> None:
    """9 query heads on 3 KV heads, windows and sinks; the oracle attends to the decoded rows."""
    lengths, limits = [(1, 70), (20, 20), (1, 129), (3, 40)], [(0, 0), (0, 0), (50, 4), (10, 17)]
    case = make_case(lengths, kv_heads=3, dims=dims, dtype=dtype, limits=limits, kv_format=FORMATS[name])
    assert_equals_reference(ops.paged_attention(*case.arguments()), case)


@pytest.mark.parametrize("group", [1, 3, 4, 8, 100])
def test_every_group_size(ops: NativeOps, dtype: torch.dtype, group: int) -> None:
    case = make_case([(1, 33), (5, 9)], group=group, dims=32, dtype=dtype)
    assert_equals_reference(ops.paged_attention(*case.arguments()), case)


@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 128])
def test_every_block_size(ops: NativeOps, dtype: torch.dtype, block_size: int) -> None:
    case = make_case([(1, 129), (40, 90)], block_size=block_size, dims=32, dtype=dtype)
    assert_equals_reference(ops.paged_attention(*case.arguments()), case)


def test_one_token_alone_attends_to_itself(ops: NativeOps, dtype: torch.dtype) -> None:
    case = make_case([(1, 1)], group=1, dtype=dtype)
    block = int(case.block_tables[0, 0])
    assert torch.equal(ops.paged_attention(*case.arguments())[0], case.value_cache[block, :, 0])


@pytest.mark.parametrize("window", [None, 50, 700])
def test_a_long_context_is_split_over_threads_and_merged(
    ops: NativeOps, dtype: torch.dtype, window: int | None
) -> None:
    case = make_case([(1, 1500), (2, 777)], kv_heads=1, dims=32, dtype=dtype, window=window)
    assert_equals_reference(ops.paged_attention(*case.arguments()), case)


def test_a_long_prefill_takes_many_tiles(ops: NativeOps, dtype: torch.dtype) -> None:
    case = make_case([(150, 300), (1, 40), (64, 64)], dims=32, dtype=dtype)
    assert_equals_reference(ops.paged_attention(*case.arguments()), case)


def test_large_scores_neither_overflow_nor_vanish(ops: NativeOps, dtype: torch.dtype) -> None:
    """Scores reach ±150, where float32 itself is only exact to 1e-5, and so are probabilities, relatively."""
    case = make_case([(1, 200), (30, 30)], dtype=dtype)
    case = replace(case, q=case.q * 30)
    assert_equals_reference(ops.paged_attention(*case.arguments()), case, float32_tolerance=2e-4)


@pytest.mark.parametrize("keys", [3, 4, 5, 70, 900])
@pytest.mark.parametrize("count", [1, 4, 80])
def test_sinks_are_seen_through_the_window_by_queries_of_their_own(
    ops: NativeOps, dtype: torch.dtype, keys: int, count: int
) -> None:
    case = make_case([(1, keys), (min(keys, 40), keys)], dims=32, dtype=dtype, limits=[(20, count), (33, count)])
    assert_equals_reference(ops.paged_attention(*case.arguments()), case)


def test_limits_of_one_sequence_leave_its_neighbours_as_they_are(ops: NativeOps, dtype: torch.dtype) -> None:
    plain = make_case([(1, 90), (30, 60), (1, 500)], dtype=dtype)
    windows, counts = torch.tensor([[0, 0, 10], [0, 0, 4]], dtype=torch.int32)
    limited = replace(plain, sinks=Sinks(windows, counts, torch.full_like(plain.q, torch.nan)))
    expected, actual = (ops.paged_attention(*case.arguments())[:31] for case in (plain, limited))
    torch.testing.assert_close(actual, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=2**-7)


HIDDEN = [[0, 5, 63], [64, 65, 0], [2**31 - 1, 29, 39], [600, 1, 699]]


def test_hidden_slots_are_as_if_they_were_not_there(rng: random.Random) -> None:
    """Head by head, equal to a sequence that begins behind them."""
    case = make_case([(1, 70), (3, 90), (1, 40), (2, 700)], kv_heads=3, group=2, dims=16, hidden=HIDDEN)
    actual, starts = paged_attention(*case.arguments()), case.query_start.tolist()
    for b, length in enumerate(case.seq_lens.tolist()):
        for head, count in enumerate(HIDDEN[b]):
            heads, rows = slice(2 * head, 2 * head + 2), slice(starts[b], starts[b + 1])
            if count >= length:
                assert not actual[rows, heads].any()
                continue
            slots = [(int(case.block_tables[b, j // 16]), j % 16) for j in range(count, length)]
            keys, values = (
                torch.stack([cache[block, head, offset] for block, offset in slots])
                for cache in (case.key_cache, case.value_cache)
            )
            queries = case.q[rows, heads].transpose(0, 1)
            visible = torch.ones(queries.shape[1], len(keys)).tril(len(keys) - queries.shape[1]).bool()
            expected = scaled_dot_product_attention(
                queries, keys.expand(2, -1, -1), values.expand(2, -1, -1), attn_mask=visible, scale=case.scale
            )
            torch.testing.assert_close(actual[rows, heads], expected.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_native_hides_what_the_reference_hides(ops: NativeOps, dtype: torch.dtype) -> None:
    case = make_case([(1, 70), (3, 90), (1, 40), (2, 700)], kv_heads=3, dims=32, dtype=dtype, hidden=HIDDEN)
    assert_equals_reference(ops.paged_attention(*case.arguments()), case)


def test_a_step_without_queries_returns_nothing(ops: NativeOps, dtype: torch.dtype) -> None:
    case = make_case([(0, 5), (0, 70)], dtype=dtype)
    assert ops.paged_attention(*case.arguments()).shape == (0, 6, 64)


def test_one_thread_gives_the_same_result_as_many(ops: NativeOps) -> None:
    case = make_case([(1, 900), (30, 200)])
    together = ops.paged_attention(*case.arguments())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.testing.assert_close(ops.paged_attention(*case.arguments()), together, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("entry", [-1, 2**31 - 7])
def test_a_needed_block_that_does_not_exist_is_refused(ops: NativeOps, entry: int) -> None:
    case = make_case([(1, 40), (1, 700)])
    case.block_tables[0, 1] = entry
    with pytest.raises(IndexError, match="block"):
        ops.paged_attention(*case.arguments())


def test_a_table_too_short_for_its_sequence_is_refused(ops: NativeOps) -> None:
    case = make_case([(1, 40)])
    with pytest.raises(IndexError, match="block"):
        ops.paged_attention(*replace(case, block_tables=case.block_tables[:, :2]).arguments())


def test_arguments_that_do_not_fit_each_other_are_refused(ops: NativeOps) -> None:
    case = make_case([(1, 40)])
    for wrong in (
        replace(case, q=case.q[:, :3]),
        replace(case, q=case.q.bfloat16()),
        replace(case, kv_format=FORMATS["fp16"]),
        replace(case, key_cache=case.key_cache.byte(), value_cache=case.value_cache.byte(), kv_format=FORMATS["int8"]),
        replace(case, seq_lens=case.seq_lens.long()),
        replace(case, query_start=case.query_start[:1]),
        replace(case, key_cache=case.key_cache.transpose(1, 2)),
        replace(case, q=case.q.transpose(1, 2).contiguous().transpose(1, 2)),
        replace(case, sinks=Sinks(case.seq_lens, case.seq_lens.long(), case.q)),
        replace(case, sinks=Sinks(case.seq_lens, case.seq_lens, case.q[:, :3])),
    ):
        with pytest.raises(ValueError, match="paged_attention: "):
            ops.paged_attention(*wrong.arguments())
