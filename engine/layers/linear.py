"""A linear map, and the formats in which its weight may be stored."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels import ops


class WeightFormat(Protocol):
    """Storage plus matmul of one weight [out, in]: everything that is written against it serves every format."""

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] → [T, out], in x's dtype."""


class Dense:
    """The weight as it is, in float32, bfloat16 or float16, laid out once for the device's matmul."""

    def __init__(self, weight: Tensor) -> None:
        """weight [out, in]; it is not needed any more afterwards."""
        self._packed = ops.pack_linear(weight)
        self._nbytes = weight.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return self._nbytes

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] → [T, out], in x's dtype."""
        return ops.linear(x, self._packed, bias)


class Grouped:
    """Codes of 4 or 8 bits with a scale for each group of inputs, multiplied as they are; activations in 8 bits."""

    def __init__(self, packed: ops.PackedGroups) -> None:
        """A weight [out, in] as `ops.pack_groups` returned it."""
        self._packed = packed
        self.bits = packed.bits

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return self._packed.nbytes

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] → [T, out], in x's dtype."""
        return ops.linear(x, self._packed, bias)


@dataclass(slots=True)
class Linear:
    """y = x Wᵀ + b. The weight is in any format; the bias is dense."""

    weight: WeightFormat
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] → [T, out]."""
        return self.weight.linear(x, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)
