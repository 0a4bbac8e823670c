"""A weight as integer codes with a scale for every group of its inputs: what GGUF's Q4_0, Q4_1 and Q8_0 hold."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupQuantized:
    """A weight [N, K]; code c in group g of row n stands for scale[n, g] · (c - zero) + minimum[n, g].

    A group is K / G inputs that follow each other. Without minimums the codes are symmetric about `zero`.
    """

    codes: Tensor
    """uint8 [N, K], each below 2^bits."""
    scale: Tensor
    """float16 [N, G]."""
    minimum: Tensor | None
    """float16 [N, G], or None."""
    bits: int
    """4 or 8."""

    @property
    def zero(self) -> int:
        """The code of 0, where there are no minimums."""
        return 1 << (self.bits - 1) if self.minimum is None else 0

    def dequantize(self) -> Tensor:
        """The weight in float32 [N, K], as the formats define it: the product rounded, then the sum."""
        values = self.codes.float().sub_(self.zero).view(*self.scale.shape, -1).mul_(self.scale.float().unsqueeze(-1))
        if self.minimum is not None:
            values += self.minimum.float().unsqueeze(-1)
        return values.view(self.codes.shape)

    def with_minimum(self) -> "GroupQuantized":
        """The same with minimums. Exact: zero is a power of two, and scales are far from float16's largest."""
        if self.minimum is not None:
            return self
        return GroupQuantized(self.codes, self.scale, self.scale * -self.zero, self.bits)


def stack(parts: Sequence[GroupQuantized]) -> GroupQuantized:
    """Weights of the same inputs and groups one below the other, in a format that holds each of them exactly."""
    first = parts[0]
    if any((part.bits, part.minimum is None) != (first.bits, first.minimum is None) for part in parts):
        parts = [part.with_minimum() for part in parts]
    minimums = [part.minimum for part in parts if part.minimum is not None]
    return GroupQuantized(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(minimums) if minimums else None,
        max(part.bits for part in parts),
    )
