"""How keys and values lie in the cache: in a dtype, or quantized per token and head into rows of bytes.

A *row* is what one token and KV head takes in one cache, in W elements of the format's dtype. It holds all that
decoding needs, so whatever moves rows need not know the format. `encode` and `decode` are the reference of the native
code in `kernels/cpu/kv_rows.h`, which writes the same rows.

In every format but bfloat16, values beyond ±65504 (float16's range, in which scales are kept) are clamped to that.
NaN makes a quantized row NaN as a whole, as it does the scores or sums that it takes part in.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

import torch
from torch import Tensor

_LARGEST: Final = torch.finfo(torch.float16).max


class KVFormat(Protocol):
    """A frozen value. D is the head dimension, W the width of a row in elements."""

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def dtype(self) -> torch.dtype:
        """A row's elements."""

    def row_width(self, head_dim: int) -> int:
        """W. Raises ValueError for a head dimension that it cannot store."""

    def encode(self, x: Tensor) -> Tensor:
        """Floats [..., D] as rows [..., W]."""

    def decode(self, rows: Tensor) -> Tensor:
        """Rows [..., W] as float32 [..., D]."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Values as they are, rounded to a dtype that need not be the queries'."""

    name: str
    dtype: torch.dtype

    def row_width(self, head_dim: int) -> int:
        return head_dim

    def encode(self, x: Tensor) -> Tensor:
        return (x if self.dtype is torch.bfloat16 else _clamped(x)).to(self.dtype)

    def decode(self, rows: Tensor) -> Tensor:
        return rows.to(torch.float32)


@dataclass(frozen=True, slots=True)
class Float8:
    """float8 e4m3fn (Micikevicius et al. 2022, §3.1) of x / scale, then the scale, absmax / 448, as float16."""

    name: ClassVar[str] = "fp8"
    dtype: ClassVar[torch.dtype] = torch.uint8

    largest: ClassVar[float] = 448.0

    def row_width(self, head_dim: int) -> int:
        return head_dim + 2

    def encode(self, x: Tensor) -> Tensor:
        x = _clamped(x)
        scale = (x.abs().amax(-1, keepdim=True) / self.largest).to(torch.float16)
        codes = (x / _divisor(scale)).clamp(-self.largest, self.largest).to(torch.float8_e4m3fn)
        return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=-1)

    def decode(self, rows: Tensor) -> Tensor:
        codes = rows[..., :-2].contiguous().view(torch.float8_e4m3fn)
        return codes.to(torch.float32) * _floats(rows[..., -2:])


@dataclass(frozen=True, slots=True)
class Integers:
    """Asymmetric integers, as QServe has them for KV (Lin et al. 2024, §4.2.2): x ≈ code · scale + least.

    The codes, 0 to 2^bits - 1, then the scale, (max - least) / (2^bits - 1), and the least value as float16. With 4
    bits byte i holds the code of dimension i in its lower half, and that of dimension i + D/2 in its upper.
    """

    bits: int

    dtype: ClassVar[torch.dtype] = torch.uint8

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def row_width(self, head_dim: int) -> int:
        if head_dim * self.bits % 8:
            raise ValueError(f"{self.name} keeps two dimensions in a byte, so it needs an even head dimension")
        return head_dim * self.bits // 8 + 4

    def encode(self, x: Tensor) -> Tensor:
        x, most = _clamped(x), 2**self.bits - 1
        least = x.amin(-1, keepdim=True).to(torch.float16)
        scale = ((x.amax(-1, keepdim=True) - least.to(torch.float32)) / most).clamp(min=0).to(torch.float16)
        steps = (x - least.to(torch.float32)) / _divisor(scale)
        codes = steps.round().nan_to_num(0.0).clamp(0, most).to(torch.uint8)
        if self.bits == 4:
            low, high = codes.chunk(2, dim=-1)
            codes = low | high << 4
        return torch.cat([codes, scale.view(torch.uint8), least.view(torch.uint8)], dim=-1)

    def decode(self, rows: Tensor) -> Tensor:
        codes = rows[..., :-4]
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], dim=-1)
        return codes.to(torch.float32) * _floats(rows[..., -4:-2]) + _floats(rows[..., -2:])


FORMATS: Final[dict[str, KVFormat]] = {
    one.name: one
    for one in (Plain("bf16", torch.bfloat16), Plain("fp16", torch.float16), Float8(), Integers(8), Integers(4))
}
"""All there are, by name."""


def _clamped(x: Tensor) -> Tensor:
    return x.to(torch.float32).clamp(-_LARGEST, _LARGEST)


def _divisor(scale: Tensor) -> Tensor:
    """The scale as float32, and 1 where it is zero or NaN: its row decodes to one value, whatever the codes are."""
    return torch.where(scale > 0, scale.to(torch.float32), 1.0)


def _floats(pairs: Tensor) -> Tensor:
    """Two bytes each [..., 2], a float16, as float32 [..., 1]."""
    return pairs.contiguous().view(torch.float16).to(torch.float32)
