"""Weights of groups of codes: packing loses nothing, and products are those of the dequantized weight."""

import pytest
import torch
from torch.nn.functional import linear

from kernels.cpu.native import NativeOps
from kernels.cpu.packed_groups import pack, unpack
from kernels.group_quantized import GroupQuantized, stack
from kernels.reference.linear_groups import linear_groups, quantize_rows

FORMATS = [(4, True), (4, False), (8, False), (8, True)]


@pytest.fixture(autouse=True)
def _has_them(request: pytest.FixtureRequest) -> None:
    if "ops" in request.fixturenames and not request.getfixturevalue("ops").has_linear_groups:
        pytest.skip("only AVX2 has them")


every_format = pytest.mark.parametrize(("bits", "minimum"), FORMATS, ids=["q4_1", "q4_0", "q8_0", "q8_1"])


def weight_of(outputs: int, inputs: int, bits: int, minimum: bool, group: int = 32) -> GroupQuantized:
    shape = outputs, inputs // group
    return GroupQuantized(
        torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8),
        torch.rand(shape).half() + 0.5,
        torch.randn(shape).half() if minimum else None,
        bits,
    )


@every_format
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (37, 96), (16, 64)])
def test_what_is_packed_is_unpacked_exactly(bits: int, minimum: bool, outputs: int, inputs: int) -> None:
    weight = weight_of(outputs, inputs, bits, minimum)
    again = unpack(pack(weight))
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scale, weight.scale)
    assert (again.minimum is None) == (weight.minimum is None)
    assert torch.equal(again.dequantize(), weight.dequantize())


@every_format
@pytest.mark.parametrize("rows", [0, 1, 5, 12, 13, 40])
def test_products_are_those_of_the_reference(
    ops: NativeOps, dtype: torch.dtype, bits: int, minimum: bool, rows: int
) -> None:
    weight, x = weight_of(37, 96, bits, minimum), torch.randn(rows, 96).to(dtype)
    bias = torch.randn(37).to(dtype)
    product = ops.linear_groups(x, pack(weight), bias)
    assert product.dtype == dtype
    tolerance = {"rtol": 2**-8, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-3}
    expected = linear_groups(x.double(), weight, bias.double())
    torch.testing.assert_close(product.double(), expected, **tolerance)


@every_format
def test_the_largest_codes_do_not_overflow(ops: NativeOps, bits: int, minimum: bool) -> None:
    weight = weight_of(16, 1536, bits, minimum)
    weight.codes.fill_((1 << bits) - 1)
    x = torch.ones(3, 1536) * torch.tensor([[1.0], [-1.0], [1e4]])
    torch.testing.assert_close(
        ops.linear_groups(x, pack(weight), None), linear_groups(x, weight, None), rtol=1e-5, atol=1e-3
    )


def test_a_row_does_not_depend_on_the_rows_beside_it(ops: NativeOps, dtype: torch.dtype) -> None:
    weight, x = pack(weight_of(64, 96, 4, True)), torch.randn(30, 96).to(dtype)
    together = ops.linear_groups(x, weight, None)
    assert torch.equal(together, torch.cat([ops.linear_groups(row, weight, None) for row in x.split(1)]))
    assert torch.equal(together[:7], ops.linear_groups(x[:7], weight, None))


def test_strided_rows_are_multiplied_as_they_stand(ops: NativeOps, dtype: torch.dtype) -> None:
    wide = torch.full((6, 100), float("nan"), dtype=dtype)
    wide[:, 3:99] = torch.randn(6, 96)
    weight = pack(weight_of(20, 96, 8, False))
    x = wide[:, 3:99]
    assert torch.equal(ops.linear_groups(x, weight, None), ops.linear_groups(x.contiguous(), weight, None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_with_a_value_that_is_no_number_gives_none(ops: NativeOps, dtype: torch.dtype, bad: float) -> None:
    x = torch.randn(2, 96).to(dtype)
    x[0, 40] = bad
    product = ops.linear_groups(x, pack(weight_of(20, 96, 4, True)), None)
    assert not product[0].isfinite().any()
    assert product[1].isfinite().all()


def test_rows_of_zeros_give_the_bias(ops: NativeOps) -> None:
    bias = torch.randn(20)
    product = ops.linear_groups(torch.zeros(2, 96), pack(weight_of(20, 96, 4, True)), bias)
    assert torch.equal(product, bias.expand(2, 20))


@every_format
def test_larger_groups_are_those_of_the_dequantized_weight(ops: NativeOps, bits: int, minimum: bool) -> None:
    weight, x = weight_of(20, 192, bits, minimum, group=64), torch.randn(3, 192)
    torch.testing.assert_close(
        ops.linear_groups(x, pack(weight), None), linear_groups(x, weight, None), rtol=1e-5, atol=1e-3
    )


def test_groups_that_are_no_multiples_of_32_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 48 inputs are not multiples of 32"):
        pack(weight_of(16, 96, 4, True, group=48))


def test_weights_of_different_formats_stack_without_loss() -> None:
    parts = [weight_of(rows, 64, bits, minimum) for rows, (bits, minimum) in zip((3, 16, 5, 2), FORMATS, strict=True)]
    whole = stack(parts)
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert stack(parts[1:2]).minimum is None


def test_activations_lose_at_most_half_a_step() -> None:
    x = torch.randn(4, 96)
    codes, scale = quantize_rows(x)
    error = (codes.view(4, 3, 32) * scale.unsqueeze(-1) - x.view(4, 3, 32)).abs()
    assert (error <= scale.unsqueeze(-1) * 0.5001).all()
    weight = weight_of(20, 96, 8, False)
    exact = linear(x.double(), weight.dequantize().double())
    assert (linear_groups(x, weight, None) - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 64), None, "weight of 96 inputs"),
        (torch.zeros(2, 192)[:, ::2], None, "weight of 96 inputs"),
        (torch.zeros(2, 96), torch.zeros(19), "bias"),
        (torch.zeros(2, 96), torch.zeros(20).bfloat16(), "bias"),
    ],
)
def test_what_does_not_fit_is_refused(ops: NativeOps, x: torch.Tensor, bias: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.linear_groups(x, pack(weight_of(20, 96, 4, True)), bias)
