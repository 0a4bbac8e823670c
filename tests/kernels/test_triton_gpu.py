"""Triton's kernels on a GPU: equal to the reference, computed on the CPU in float32."""

import random
from dataclasses import replace

import pytest
import torch

from kernels import ops
from kernels.reference.attention_mass import attention_mass
from tests.kernels.attention_cases import AttentionCase, make_case, random_case
from tests.kernels.test_attention_mass import arguments, random_mass_case
from tests.kernels.test_paged_attention import HIDDEN, assert_equals_reference

pytestmark = pytest.mark.gpu


def on_gpu(case: AttentionCase) -> AttentionCase:
    """The same case there."""
    sinks, hidden = case.sinks, case.hidden
    return replace(
        case,
        q=case.q.cuda(),
        key_cache=case.key_cache.cuda(),
        value_cache=case.value_cache.cuda(),
        block_tables=case.block_tables.cuda(),
        query_start=case.query_start.cuda(),
        seq_lens=case.seq_lens.cuda(),
        sinks=None if sinks is None else type(sinks)(*(x.cuda() for x in sinks)),
        hidden=None if hidden is None else hidden.cuda(),
    )


def check(case: AttentionCase) -> None:
    """float32 is multiplied as float32, so its tolerance is as on a CPU."""
    out = ops.paged_attention(*on_gpu(case).arguments(), backend="triton")
    assert_equals_reference(out.cpu(), case, float32_tolerance=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(20))
def test_attention_on_odd_shapes(dtype: torch.dtype, seed: int) -> None:
    check(random_case(random.Random(seed), dtype))


@pytest.mark.parametrize("dims", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("lengths", [[(1, 3000), (1, 17)], [(700, 1500), (1, 90)], [(3, 2000)] * 8])
def test_attention_in_every_kind_of_batch(dims: int, lengths: list[tuple[int, int]]) -> None:
    check(make_case(lengths, dims=dims, group=4, dtype=torch.bfloat16))


def test_hidden_slots() -> None:
    check(make_case([(1, 70), (40, 90), (1, 40), (2, 700)], kv_heads=3, dtype=torch.bfloat16, hidden=HIDDEN))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(20))
def test_mass_on_odd_shapes(dtype: torch.dtype, seed: int) -> None:
    case, mass, counts = random_mass_case(random.Random(seed), dtype)
    expected, there = mass.clone(), on_gpu(case)
    attention_mass(*arguments(case.in_float32()), expected, counts, case.hidden)
    actual = mass.cuda()
    ops.attention_mass(
        *arguments(there), actual, type(counts)(*(x.cuda() for x in counts)), there.hidden, case.kv_format, "triton"
    )
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
