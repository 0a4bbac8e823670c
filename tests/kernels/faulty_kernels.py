"""Kernels with the faults that the interpreter's guards are to find, and one without."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def shift(x, out, first, size, N: tl.constexpr):
    """out = x, both from element ``first`` on, for ``size`` elements."""
    offsets = tl.arange(0, N)
    values = tl.load(x + first + offsets, mask=(offsets < size) & (first + offsets >= 0), other=0.0)
    tl.store(out + first + offsets, values, mask=offsets < size)


@triton.jit
def product(a, b, out, N: tl.constexpr):
    """out = a · b, N × N."""
    places = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + places, tl.dot(tl.load(a + places), tl.load(b + places)).to(out.dtype.element_ty))


def shifted(x: Tensor, first: int, size: int) -> Tensor:
    """A copy of x, if ``first`` is 0 and ``size`` its length."""
    out = torch.empty(x.shape, dtype=x.dtype)
    shift[(1,)](x, out, first, size, N=64)
    return out


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    """a · b in their dtype."""
    out = torch.empty(a.shape, dtype=a.dtype)
    product[(1,)](a, b, out, N=a.shape[0])
    return out
