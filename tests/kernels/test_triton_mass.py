"""Triton's attention mass under the interpreter: equal to the reference, and others' slots stay as they are."""

import random

import pytest
import torch
from torch import Tensor

from kernels.counted import Counted
from kernels.kv_format import FORMATS
from kernels.reference.attention_mass import attention_mass
from kernels.triton.gpu import GPU
from tests.kernels.attention_cases import AttentionCase, make_case
from tests.kernels.interpreter import Interpreter
from tests.kernels.test_attention_mass import arguments, counted, random_mass_case
from tests.kernels.test_triton_attention import DTYPES, FEW, SMALL


def check(interpreter: Interpreter, case: AttentionCase, mass: Tensor, counts: Counted, gpu: GPU = SMALL) -> None:
    """Mass before is what is given, NaN where nothing was; slots that are nobody's must stay NaN."""
    expected = mass.clone()
    attention_mass(*arguments(case.in_float32()), expected, counts, case.hidden)
    actual = mass.clone()
    interpreter.call(
        "kernels.triton.attention_mass",
        "attention_mass",
        *arguments(case),
        actual,
        counts,
        case.hidden,
        case.kv_format,
        gpu=gpu,
    )
    tolerance = 1e-4 if case.q.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("gpu", [SMALL, FEW], ids=["split", "whole"])
def test_odd_shapes(interpreter: Interpreter, dtype: torch.dtype, rng: random.Random, gpu: GPU) -> None:
    check(interpreter, *random_mass_case(rng, dtype), gpu)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_the_cache(interpreter: Interpreter, name: str) -> None:
    case = make_case([(1, 70), (20, 20)], dims=48, kv_heads=1, dtype=torch.float16, kv_format=FORMATS[name])
    check(interpreter, case, torch.full(case.key_cache.shape[:3], torch.nan), counted((0, 0), (1, 0)))


def test_a_decoding_step_adds_to_what_is_kept(interpreter: Interpreter) -> None:
    """Of 4 sequences the second counts nothing and the last has no query; the mass of both is not touched."""
    case = make_case([(1, 700), (1, 40), (1, 3), (0, 90)], dims=32, kv_heads=2, group=4, dtype=torch.float16)
    mass = torch.rand(case.key_cache.shape[:3])
    check(interpreter, case, mass, counted((0, 699), (1, -1), (2, 2), (3, 90)))


def test_a_group_larger_than_a_tile(interpreter: Interpreter) -> None:
    case = make_case([(1, 33), (2, 5)], dims=16, kv_heads=2, group=100, dtype=torch.float32)
    check(interpreter, case, torch.rand(case.key_cache.shape[:3]), counted((0, 32), (1, 3)))


def test_arguments_that_do_not_fit_each_other_are_refused(interpreter: Interpreter) -> None:
    case, counts = make_case([(1, 40)]), counted((0, 39))
    mass, long = torch.zeros(case.key_cache.shape[:3]), counts._replace(kept=counts.kept.long())
    for wrong_mass, wrong_counts in ((mass[1:], counts), (mass.double(), counts), (mass, long)):
        with pytest.raises(ValueError, match="attention: "):
            interpreter.call(
                "kernels.triton.attention_mass", "attention_mass", *arguments(case), wrong_mass, wrong_counts, gpu=SMALL
            )
