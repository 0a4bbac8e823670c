"""Triton's paged attention under the interpreter: equal to the reference, in every variant, without touching poison.

bfloat16's numbers are the kernels' own but for how the interpreter multiplies (see `interpreter.py`) and rounds.
"""

import random
from dataclasses import replace

import pytest
import torch

from kernels.kv_format import FORMATS
from kernels.sinks import Sinks
from kernels.triton.gpu import A100, GPU, H200
from tests.kernels.attention_cases import AttentionCase, make_case, random_case
from tests.kernels.interpreter import Interpreter
from tests.kernels.test_paged_attention import HIDDEN, assert_equals_reference

FEW = GPU((9, 0), 1)
"""A GPU that is filled by any batch, so that nothing is split."""

SMALL = GPU((9, 0), 12)
"""One on which few programs are enough for splits."""

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])


def check(interpreter: Interpreter, case: AttentionCase, gpu: GPU = SMALL) -> None:
    actual = interpreter.call("kernels.triton.paged_attention", "paged_attention", *case.arguments(), gpu=gpu)
    assert_equals_reference(actual, case, float32_tolerance=2e-5)


@DTYPES
def test_odd_shapes(interpreter: Interpreter, dtype: torch.dtype, rng: random.Random) -> None:
    check(interpreter, random_case(rng, dtype), rng.choice([SMALL, A100, FEW]))


@pytest.mark.parametrize("dims", [16, 48, 64, 80, 96, 128, 256])
def test_every_head_dimension(interpreter: Interpreter, dims: int) -> None:
    check(interpreter, make_case([(1, 70), (0, 3), (1, 9)], dims=dims, dtype=torch.float16))
    check(interpreter, make_case([(20, 20), (3, 70)], kv_heads=1, dims=dims, dtype=torch.float16))


@pytest.mark.parametrize("gpu", [A100, H200, FEW], ids=["sm80", "sm90", "unsplit"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_the_cache(interpreter: Interpreter, name: str, gpu: GPU) -> None:
    limits = [(0, 0), (50, 4), (10, 17)]
    for dtype, lengths in (
        (torch.float16, [(1, 70), (1, 129), (1, 40)]),
        (torch.bfloat16, [(20, 20), (1, 129), (3, 40)]),
    ):
        check(
            interpreter,
            make_case(lengths, kv_heads=1, dims=48, dtype=dtype, limits=limits, kv_format=FORMATS[name]),
            gpu,
        )


@pytest.mark.parametrize("group", [1, 3, 4, 8, 100])
def test_every_group_size(interpreter: Interpreter, group: int) -> None:
    check(
        interpreter, make_case([(1, 33), (1, 2)], group=group, dims=32, kv_heads=1 + (group < 9), dtype=torch.float16)
    )
    check(interpreter, make_case([(5, 9), (1, 33)], group=group, dims=32, kv_heads=1, dtype=torch.float16))


@pytest.mark.parametrize("block_size", [1, 16, 24, 128])
def test_every_block_size(interpreter: Interpreter, block_size: int) -> None:
    check(interpreter, make_case([(1, 129), (1, 300)], block_size=block_size, dims=32, kv_heads=1, dtype=torch.float16))
    check(interpreter, make_case([(40, 90)], block_size=block_size, dims=32, kv_heads=1, dtype=torch.float16))


@pytest.mark.parametrize("window", [None, 50, 700])
def test_a_long_context_is_split_and_merged(interpreter: Interpreter, window: int | None) -> None:
    check(interpreter, make_case([(1, 1500), (1, 777)], kv_heads=1, dims=32, dtype=torch.float16, window=window))


@pytest.mark.parametrize("window", [None, 20, 100])
def test_a_prefill_masks_only_the_tiles_at_its_edges(interpreter: Interpreter, window: int | None) -> None:
    lengths = [(150, 300), (1, 40), (64, 64), (0, 1)]
    check(interpreter, make_case(lengths, kv_heads=1, dims=16, dtype=torch.float16, window=window), FEW)


@pytest.mark.parametrize("keys", [3, 5, 70, 400])
@pytest.mark.parametrize("count", [1, 80])
def test_sinks_are_seen_through_the_window_by_queries_of_their_own(
    interpreter: Interpreter, keys: int, count: int
) -> None:
    for lengths in ([(1, keys)] * 2, [(1, keys), (min(keys, 40), keys)]):
        check(
            interpreter, make_case(lengths, dims=16, kv_heads=1, dtype=torch.float32, limits=[(20, count), (33, count)])
        )


def test_limits_of_one_sequence_leave_its_neighbours_as_they_are(interpreter: Interpreter) -> None:
    plain = make_case([(1, 90), (30, 60), (1, 200)], kv_heads=1, dtype=torch.float16)
    windows, counts = torch.tensor([[0, 0, 10], [0, 0, 4]], dtype=torch.int32)
    limited = replace(plain, sinks=Sinks(windows, counts, torch.full_like(plain.q, torch.nan)))
    expected, actual = (
        interpreter.call("kernels.triton.paged_attention", "paged_attention", *case.arguments(), gpu=H200)[:31]
        for case in (plain, limited)
    )
    torch.testing.assert_close(actual, expected, rtol=2**-9, atol=2**-9)


@pytest.mark.parametrize("gpu", [SMALL, FEW], ids=["split", "whole"])
def test_hidden_slots_are_as_if_they_were_not_there(interpreter: Interpreter, gpu: GPU) -> None:
    case = make_case([(1, 70), (1, 90), (1, 40), (1, 700)], kv_heads=3, dims=32, dtype=torch.float16, hidden=HIDDEN)
    check(interpreter, case, gpu)
    case = make_case([(1, 70), (40, 90), (1, 40), (2, 700)], kv_heads=3, dims=32, dtype=torch.float16, hidden=HIDDEN)
    check(interpreter, case, gpu)


def test_large_scores_neither_overflow_nor_vanish(interpreter: Interpreter) -> None:
    case = make_case([(1, 200), (30, 30)], kv_heads=1)
    case = replace(case, q=case.q * 30)
    actual = interpreter.call("kernels.triton.paged_attention", "paged_attention", *case.arguments(), gpu=H200)
    assert_equals_reference(actual, case, float32_tolerance=2e-4)


def test_a_step_without_queries_returns_nothing(interpreter: Interpreter) -> None:
    case = make_case([(0, 5), (0, 70)], dtype=torch.float16)
    assert interpreter.call("kernels.triton.paged_attention", "paged_attention", *case.arguments(), gpu=H200).shape == (
        0,
        6,
        64,
    )


def test_queries_at_odd_addresses_are_copied(interpreter: Interpreter) -> None:
    case = make_case([(1, 20)], group=1, dims=16, dtype=torch.float16)
    wide = torch.randn(1, 2, 19, dtype=torch.float16)
    check(interpreter, replace(case, q=wide[:, :, 3:]))


def test_arguments_that_do_not_fit_each_other_are_refused(interpreter: Interpreter) -> None:
    case = make_case([(1, 40)])
    for wrong in (
        replace(case, q=case.q[:, :3]),
        replace(case, q=case.q.bfloat16()),
        replace(case, kv_format=FORMATS["fp16"]),
        replace(case, seq_lens=case.seq_lens.long()),
        replace(case, query_start=case.query_start[:1]),
        replace(case, key_cache=case.key_cache.transpose(1, 2)),
        replace(case, q=case.q.transpose(1, 2).contiguous().transpose(1, 2)),
        replace(case, sinks=Sinks(case.seq_lens, case.seq_lens.long(), case.q)),
        replace(case, sinks=Sinks(case.seq_lens, case.seq_lens, case.q[:, :3])),
    ):
        with pytest.raises(ValueError, match="attention: "):
            interpreter.call("kernels.triton.paged_attention", "paged_attention", *wrong.arguments(), gpu=H200)
