"""Packed and plain weights give the same products."""

import pytest
import torch
from torch.nn.functional import linear

from kernels import ops


@pytest.mark.parametrize("shape", [(21,), (0, 21), (1, 21), (33, 21), (2, 3, 21)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_packed_weight_multiplies_as_the_plain_one(dtype: torch.dtype, shape: tuple[int, ...], biased: bool) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(37, 21).to(dtype)
    bias = torch.randn(37).to(dtype) if biased else None
    expected = linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = {"rtol": 2**-7, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for form in (weight, ops.pack_linear(weight)):
        product = ops.linear(x, form, bias)
        assert product.dtype == dtype
        torch.testing.assert_close(product.double(), expected, **tolerance)


def test_a_strided_input_is_multiplied_as_it_stands(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 40).to(dtype)[:, 3:24], torch.randn(8, 21).to(dtype)
    torch.testing.assert_close(ops.linear(x, ops.pack_linear(weight)), linear(x, weight), rtol=2**-7, atol=1e-5)


def test_packing_drops_the_gradient_that_serving_never_needs(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8).to(dtype))
    packed = ops.pack_linear(weight)
    assert packed is weight or not getattr(packed, "panels", packed).requires_grad


def test_a_dtype_that_cannot_be_packed_stays_as_it_is() -> None:
    weight = torch.randn(4, 4, dtype=torch.float64)
    assert ops.pack_linear(weight) is weight
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(ops.linear(x, weight), linear(x, weight))
