"""Norm, rotary embedding, activation and cache write: native equals reference, and nothing else is touched."""

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.cpu.native import NativeOps
from kernels.kv_format import FORMATS
from kernels.reference.kv_write import kv_write
from kernels.reference.rms_norm import rms_norm
from kernels.reference.rotary_embedding import rotary_embedding
from kernels.reference.silu_and_mul import silu_and_mul

View = Callable[[Tensor], Tensor]


def assert_within_one_rounding(actual: Tensor, expected: Tensor) -> None:
    """Equal but for one unit in the last place, 2^-7 in bfloat16, where a near-tie fell otherwise; 1e-5 in float32."""
    relative = 2**-7 if expected.dtype == torch.bfloat16 else 1e-5
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=relative, atol=1e-6)


def test_rms_norm_of_rows_equals_the_reference(ops: NativeOps, dtype: torch.dtype, rng: random.Random) -> None:
    n, rows = rng.choice([1, 7, 16, 33, 576, 1000]), rng.choice([0, 1, 5, 200])
    x = (torch.randn(rows, n + 5) * 3).to(dtype)[:, 2 : 2 + n]
    weight = torch.randn(n).to(dtype)
    assert_within_one_rounding(ops.rms_norm(x, weight, 1e-5, None), rms_norm(x, weight, 1e-5))


def test_rms_norm_of_heads_reads_a_strided_view(
    ops: NativeOps, dtype: torch.dtype, rng: random.Random, strided: View
) -> None:
    x = strided(torch.randn(rng.choice([1, 9]), rng.choice([1, 3, 8]), rng.choice([16, 80, 128])).to(dtype))
    weight = torch.randn(x.shape[-1]).to(dtype)
    assert_within_one_rounding(ops.rms_norm(x, weight, 1e-6, None), rms_norm(x, weight, 1e-6))


def test_rms_norm_adds_to_the_residual_in_place(ops: NativeOps, dtype: torch.dtype, rng: random.Random) -> None:
    n, rows = rng.choice([5, 64, 576]), rng.choice([1, 4, 150])
    x, weight = torch.randn(rows, n).to(dtype), torch.randn(n).to(dtype)
    residual = (torch.randn(rows, n) * 10).to(dtype)
    expected_residual = residual.clone()
    expected = rms_norm(x, weight, 1e-5, expected_residual)
    unchanged = x.clone()
    assert_within_one_rounding(ops.rms_norm(x, weight, 1e-5, residual), expected)
    assert torch.equal(residual, expected_residual)
    assert torch.equal(x, unchanged)


def test_rotary_embedding_rotates_a_strided_view_in_place_and_nothing_else(
    ops: NativeOps, dtype: torch.dtype, rng: random.Random
) -> None:
    tokens, q_heads, k_heads = rng.choice([1, 5, 120]), rng.choice([1, 9]), rng.choice([1, 3])
    dims = rng.choice([16, 64, 80, 128])
    half = rng.choice([dims // 2, dims // 4, 1])
    fused = torch.randn(tokens, q_heads + 2 * k_heads, dims).to(dtype)
    angles = torch.rand(tokens, half) * 100
    cos, sin = angles.cos(), torch.cat([angles.sin(), angles], dim=1)[:, :half]
    expected = fused.clone()
    rotary_embedding(expected[:, :q_heads], expected[:, q_heads : q_heads + k_heads], cos, sin)
    ops.rotary_embedding(fused[:, :q_heads], fused[:, q_heads : q_heads + k_heads], cos, sin)
    assert_within_one_rounding(fused, expected)
    assert torch.equal(fused[:, q_heads + k_heads :], expected[:, q_heads + k_heads :])
    assert torch.equal(fused[..., 2 * half :], expected[..., 2 * half :])


def test_rotary_embedding_preserves_length(ops: NativeOps) -> None:
    q, k = torch.randn(3, 2, 8), torch.randn(3, 1, 8)
    before = q.norm(dim=-1)
    angles = torch.rand(3, 4)
    ops.rotary_embedding(q, k, angles.cos(), angles.sin())
    torch.testing.assert_close(q.norm(dim=-1), before)


def test_silu_and_mul_equals_the_reference(ops: NativeOps, dtype: torch.dtype, rng: random.Random) -> None:
    n, rows = rng.choice([1, 15, 64, 1536]), rng.choice([0, 1, 3, 60])
    x = (torch.randn(rows, 2 * n + 3) * 8).to(dtype)[:, 1 : 1 + 2 * n]
    assert_within_one_rounding(ops.silu_and_mul(x), silu_and_mul(x))


def test_silu_and_mul_holds_at_extremes(ops: NativeOps, dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -1e-30, 0.0, 88.0, 200.0, 1e30, math.inf, math.nan]).to(dtype)
    x = torch.cat([gate, torch.ones_like(gate)])[None]
    torch.testing.assert_close(ops.silu_and_mul(x), silu_and_mul(x), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_kv_write_fills_its_slots_and_leaves_all_others(
    ops: NativeOps, dtype: torch.dtype, rng: random.Random, strided: View
) -> None:
    tokens, heads, dims = rng.choice([0, 1, 17, 300]), rng.choice([1, 3]), rng.choice([16, 80])
    block_size, blocks = rng.choice([1, 8, 16]), 400
    k, v = (strided(torch.randn(tokens, heads, dims).to(dtype)) for _ in range(2))
    slots = torch.randperm(blocks * block_size)[:tokens]
    slots[::3] = -1 - slots[::3]
    actual = [torch.full((blocks, heads, block_size, dims), math.pi).to(dtype) for _ in range(2)]
    expected = [cache.clone() for cache in actual]
    ops.kv_write(k, v, *actual, slots)
    kv_write(k, v, *expected, slots)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(actual[0][slot // block_size, :, slot % block_size], k[token])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dims", [2, 64, 98])
def test_native_rows_of_a_format_are_the_reference_s_byte_for_byte(
    ops: NativeOps, dtype: torch.dtype, name: str, dims: int, strided: View
) -> None:
    """Values and offsets of all magnitudes, from float16's subnormals to beyond its range; and an infinity."""
    kv_format, tokens = FORMATS[name], 300
    spread, offset = torch.logspace(-9, 5, tokens)[:, None, None], torch.logspace(5, -5, tokens)[:, None, None]
    values = torch.randn(2, tokens, 3, dims) * spread + torch.randn(2, tokens, 3, 1) * offset
    values[0, 0, 0, 1] = math.inf
    k, v = (strided(part.to(dtype)) for part in values)
    slots = torch.randperm(320)[:tokens]
    rows = torch.zeros(20, 3, 16, kv_format.row_width(dims), dtype=kv_format.dtype)
    actual, expected = ([rows.clone(), rows.clone()] for _ in range(2))
    ops.kv_write(k, v, *actual, slots, kv_format)
    kv_write(k, v, *expected, slots, kv_format)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_a_nan_spoils_its_own_row_natively_too(ops: NativeOps, name: str) -> None:
    kv_format, k = FORMATS[name], torch.ones(1, 2, 16)
    k[0, 1, 15] = math.nan
    caches = [torch.zeros(1, 2, 4, kv_format.row_width(16), dtype=kv_format.dtype) for _ in range(2)]
    ops.kv_write(k, k, *caches, torch.tensor([2]), kv_format)
    for cache in caches:
        decoded = kv_format.decode(cache[0, :, 2])
        assert not decoded[0].isnan().any()
        assert decoded[1].isnan().all()


def test_a_slot_past_the_cache_is_refused_and_not_written(ops: NativeOps) -> None:
    k, cache = torch.ones(2, 1, 4), torch.zeros(3, 1, 2, 4)
    with pytest.raises(IndexError, match="1 slots"):
        ops.kv_write(k, k, cache, cache.clone(), torch.tensor([6, 0]))
    assert cache.sum() == 4


@pytest.mark.parametrize(
    "call",
    [
        lambda ops: ops.rms_norm(torch.zeros(2, 4), torch.zeros(3), 1e-5, None),
        lambda ops: ops.rms_norm(torch.zeros(2, 4), torch.zeros(4).bfloat16(), 1e-5, None),
        lambda ops: ops.rms_norm(torch.zeros(4, 2).T, torch.zeros(4), 1e-5, None),
        lambda ops: ops.rms_norm(torch.zeros(2, 4), torch.zeros(4), 1e-5, torch.zeros(1, 4)),
        lambda ops: ops.silu_and_mul(torch.zeros(2, 3)),
        lambda ops: ops.rotary_embedding(*[torch.zeros(2, 1, 4)] * 2, *[torch.zeros(2, 3)] * 2),
        lambda ops: ops.rotary_embedding(*[torch.zeros(2, 1, 4)] * 2, *[torch.zeros(1, 2)] * 2),
        lambda ops: ops.kv_write(*[torch.zeros(2, 1, 4)] * 2, *[torch.zeros(3, 2, 8, 4)] * 2, torch.tensor([0, 1])),
        lambda ops: ops.kv_write(*[torch.zeros(2, 1, 4)] * 2, *[torch.zeros(3, 1, 8, 4)] * 2, torch.tensor([0])),
        lambda ops: ops.kv_write(
            *[torch.zeros(1, 1, 4)] * 2, *[torch.zeros(3, 1, 8, 4).byte()] * 2, torch.tensor([0]), FORMATS["int8"]
        ),
    ],
)
def test_arguments_that_do_not_fit_each_other_are_refused(ops: NativeOps, call: Callable[[NativeOps], object]) -> None:
    with pytest.raises(ValueError, match=r"\w+: "):
        call(ops)
