"""The batches and caches that attention's variants are declared for: data on torch's `meta` device, without memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kernels.kv_format import FORMATS, KVFormat
from kernels.sinks import Sinks

HEADS: Final = {64: (9, 3), 80: (32, 32), 96: (32, 32), 128: (32, 8), 256: (16, 8)}
"""Query and KV heads by head dimension: those of SmolLM2 135M, Phi-2, Phi-3 mini, Llama 3.1 8B and Gemma 2 9B."""

BATCHES: Final = {
    "decode": (128, 128, 256),
    "decode split": (8, 8, 512),
    "few": (512, 128, 256),
    "prefill": (4096, 4, 256),
}
"""T query tokens, B sequences, and M columns of the block table."""

LIMITS: Final = ("window", "sinks", "hidden", "sinks hidden")


@dataclass(frozen=True, slots=True)
class Shape:
    """One call of attention, as far as planning it goes."""

    batch: str
    dims: int
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16
    cache: str = ""
    """A format's name; empty: the cache holds the queries' dtype."""
    limits: str = ""

    @property
    def name(self) -> str:
        """``decode split d128 bf16 page16 int8 window``"""
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        parts = (self.batch, f"d{self.dims}", dtype, f"page{self.block_size}", self.cache, self.limits)
        return " ".join(part for part in parts if part)

    @property
    def kv_format(self) -> KVFormat | None:
        return FORMATS[self.cache] if self.cache else None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, a cache, block_tables, query_start and seq_lens."""
        tokens, sequences, columns = BATCHES[self.batch]
        heads, kv_heads = HEADS[self.dims]
        one = self.kv_format
        row, stored = (self.dims, self.dtype) if one is None else (one.row_width(self.dims), one.dtype)
        return (
            torch.empty((tokens, heads + 2 * kv_heads, self.dims), dtype=self.dtype, device="meta")[:, :heads],
            torch.empty((sequences * columns, kv_heads, self.block_size, row), dtype=stored, device="meta"),
            counts(sequences, columns),
            counts(sequences + 1),
            counts(sequences),
        )

    def sinks(self) -> Sinks | None:
        if "sinks" not in self.limits:
            return None
        tokens, sequences, _ = BATCHES[self.batch]
        q = torch.empty((tokens, HEADS[self.dims][0], self.dims), dtype=self.dtype, device="meta")
        return Sinks(counts(sequences), counts(sequences), q)

    def window(self) -> int | None:
        return 4096 if self.limits == "window" else None

    def hidden(self) -> Tensor | None:
        return counts(BATCHES[self.batch][1], HEADS[self.dims][1]) if "hidden" in self.limits else None


def counts(*shape: int) -> Tensor:
    """int32 of this shape."""
    return torch.empty(shape, dtype=torch.int32, device="meta")


def attention_shapes() -> Iterator[Shape]:
    """Every head dimension in the plain case; every other thing with the dimensions 64 and 128, some with one alone."""
    for dims in HEADS:
        yield from (Shape(batch, dims) for batch in BATCHES)
    for batch in ("decode", "decode split", "prefill"):
        for dims in (64, 128):
            yield Shape(batch, dims, torch.float16)
            yield from (Shape(batch, dims, cache=name) for name in ("fp16", "fp8", "int8", "int4"))
            yield from (Shape(batch, dims, limits=limits) for limits in LIMITS)
        yield from (Shape(batch, 128, block_size=size) for size in (32, 64, 128))
        yield Shape(batch, 80, cache="int4")
        yield Shape(batch, 128, cache="int8", limits="sinks hidden")
    yield Shape("decode", 64, torch.float32)
    yield Shape("prefill", 64, torch.float32)
