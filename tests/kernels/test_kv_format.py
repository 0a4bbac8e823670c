"""Formats of the KV cache: what a row gives back of what it was made of."""

import math

import pytest
import torch
from torch import Tensor

from kernels.kv_format import FORMATS, Integers

HALF = 2.0**-11
"""The relative error of rounding to float16."""


@pytest.fixture(params=FORMATS)
def name(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def there_and_back(name: str, x: Tensor) -> Tensor:
    return FORMATS[name].decode(FORMATS[name].encode(x))


def test_a_row_is_as_wide_as_it_says(name: str) -> None:
    rows = FORMATS[name].encode(torch.randn(5, 3, 80))
    assert rows.shape == (5, 3, FORMATS[name].row_width(80))
    assert rows.dtype is FORMATS[name].dtype
    assert FORMATS[name].encode(torch.empty(0, 3, 80)).shape == (0, 3, rows.shape[-1])


@pytest.mark.parametrize(("name", "width"), [("bf16", 128), ("fp16", 128), ("fp8", 66), ("int8", 68), ("int4", 36)])
def test_bytes_of_64_dimensions(name: str, width: int) -> None:
    assert FORMATS[name].row_width(64) * FORMATS[name].dtype.itemsize == width


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("offset", [0.0, 3.0, -200.0])
def test_integers_are_off_by_half_a_step_and_the_rounding_of_their_ends(name: str, offset: float) -> None:
    x = torch.randn(400, 64) * torch.logspace(-3, 3, 400)[:, None] + offset
    kv_format = FORMATS[name]
    assert isinstance(kv_format, Integers)
    lowest, highest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (highest - lowest) / (2**kv_format.bits - 1)
    at_ends = HALF * (lowest.abs() + (highest - lowest)) * 1.01
    error = (there_and_back(name, x) - x).abs()
    assert (error <= step / 2 + at_ends).all()
    assert (error > step / 3).any()


def test_fp8_is_off_by_a_sixteenth_of_a_value_or_half_of_its_smallest_step() -> None:
    x = torch.randn(400, 64) * torch.logspace(-1, 3, 400)[:, None]
    scale = x.abs().amax(-1, keepdim=True) / 448
    error = (there_and_back("fp8", x) - x).abs()
    assert (error <= torch.maximum(x.abs() * (2**-4 + HALF), 2**-10 * scale * 1.01)).all()


def test_integers_err_less_the_more_bits_they_have() -> None:
    x = torch.randn(100, 64)
    errors = [(there_and_back(name, x) - x).square().mean() for name in ("fp16", "bf16", "int8", "fp8", "int4")]
    assert errors == sorted(errors)


def test_what_was_decoded_is_encoded_to_the_same_row(name: str) -> None:
    rows = FORMATS[name].encode(torch.randn(400, 64))
    assert torch.equal(FORMATS[name].encode(FORMATS[name].decode(rows)), rows)


@pytest.mark.parametrize("value", [0.0, 1.5, -24.0, 448.0])
def test_a_constant_comes_back_as_it_was(name: str, value: float) -> None:
    back = there_and_back(name, torch.full((64,), value))
    assert (back - value).abs().max() <= (abs(value) * HALF if name == "fp8" else 0)


def test_bytes_of_zero_are_zeros(name: str) -> None:
    """Native attention puts them in the place of slots that are not there."""
    rows = torch.zeros(2, FORMATS[name].row_width(16), dtype=FORMATS[name].dtype)
    assert torch.equal(FORMATS[name].decode(rows), torch.zeros(2, 16))


@pytest.mark.parametrize("huge", [7e4, 3e38, math.inf])
def test_what_float16_cannot_hold_is_clamped(name: str, huge: float) -> None:
    back = there_and_back(name, torch.tensor([-huge, 0.0, 1.0, huge]))
    bound = huge if name == "bf16" else 65504.0
    torch.testing.assert_close(back[[0, 3]], torch.tensor([-bound, bound]), rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_a_nan_spoils_its_row_and_no_other(name: str) -> None:
    x = torch.randn(3, 16)
    x[1, 7] = math.nan
    assert there_and_back(name, x).isnan().all(-1).tolist() == [False, True, False]


def test_two_codes_in_a_byte_need_an_even_head_dimension() -> None:
    with pytest.raises(ValueError, match="even head dimension"):
        FORMATS["int4"].row_width(63)
    assert FORMATS["int8"].row_width(63) == 67
