"""Random paged-attention inputs in which everything that must not be read is poison."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.kv_format import FORMATS, KVFormat
from kernels.sinks import Sinks


@dataclass(frozen=True)
class AttentionCase:
    """Arguments of `paged_attention`; unpack with `arguments()`."""

    q: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    query_start: Tensor
    seq_lens: Tensor
    scale: float
    window: int | None
    sinks: Sinks | None = None
    hidden: Tensor | None = None
    kv_format: KVFormat | None = None

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.q, self.key_cache, self.value_cache, self.block_tables, self.query_start, self.seq_lens, self.scale,
            self.window, self.sinks, self.hidden, self.kv_format,
        )  # fmt: skip

    def in_float32(self) -> "AttentionCase":
        """The same values, decoded, for an oracle without rounding."""
        decode = torch.Tensor.float if self.kv_format is None else self.kv_format.decode
        return replace(
            self,
            q=self.q.float(),
            key_cache=decode(self.key_cache),
            value_cache=decode(self.value_cache),
            kv_format=None,
            sinks=None if self.sinks is None else self.sinks._replace(q=self.sinks.q.float()),
        )

    def limits(self, b: int) -> tuple[int, int]:
        """Sequence b's window, longer than the sequence where nothing is hidden, and its sinks."""
        length = int(self.seq_lens[b]) + 1
        own, count = (0, 0) if self.sinks is None else (int(self.sinks.windows[b]), int(self.sinks.counts[b]))
        return min(self.window or length, own or length), count

    def with_absolute_values(self) -> "AttentionCase":
        """Attention over |V|: what an output's rounding errors are proportional to."""
        return replace(self, value_cache=self.value_cache.abs())


def make_case(
    lengths: Sequence[tuple[int, int]],
    *,
    kv_heads: int = 2,
    group: int = 3,
    dims: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    limits: Sequence[tuple[int, int]] | None = None,
    hidden: Sequence[Sequence[int]] | None = None,
    kv_format: KVFormat | None = None,
) -> AttentionCase:
    """A case with sequences of (queries, keys): q a strided view, spare cache slots NaN, spare table entries huge.

    ``limits`` are each sequence's own window (0: none) and sinks, ``hidden`` its first slots that KV heads do not see.
    """
    needs = [-(-keys // block_size) for _, keys in lengths]
    blocks = torch.randperm(sum(needs) + 2)[: sum(needs)].tolist()
    caches = [torch.full((sum(needs) + 2, kv_heads, block_size, dims), math.nan) for _ in range(2)]
    tables = torch.full((len(lengths), max(needs) + 2), 2**31 - 7, dtype=torch.int32)
    for b, (queries, keys) in enumerate(lengths):
        mine = [blocks.pop() for _ in range(needs[b])]
        tables[b, : needs[b]] = torch.tensor(mine, dtype=torch.int32)
        own, num_sinks = limits[b] if limits else (0, 0)
        first = max(0, keys - queries - min(window or keys, own or keys) + 1)
        for position in {*range(min(num_sinks, keys)), *range(first, keys)} if queries else ():
            for cache in caches:
                seen = torch.tensor([position >= count for count in hidden[b]] if hidden else [True] * kv_heads)
                cache[mine[position // block_size], seen, position % block_size] = torch.randn(int(seen.sum()), dims)
    starts = torch.tensor([0] + [queries for queries, _ in lengths]).cumsum(0)
    fused = torch.randn(2, int(starts[-1]), kv_heads * (group + 2), dims).to(dtype)
    sinks = None
    if limits is not None:
        windows, counts = torch.tensor(limits, dtype=torch.int32).unbind(1)
        sinks = Sinks(windows.contiguous(), counts.contiguous(), fused[1, :, 1 : 1 + kv_heads * group])
    return AttentionCase(
        q=fused[0, :, : kv_heads * group],
        key_cache=caches[0].to(dtype) if kv_format is None else kv_format.encode(caches[0]),
        value_cache=caches[1].to(dtype) if kv_format is None else kv_format.encode(caches[1]),
        block_tables=tables,
        query_start=starts.to(torch.int32),
        seq_lens=torch.tensor([keys for _, keys in lengths], dtype=torch.int32),
        scale=1 / math.sqrt(dims),
        window=window,
        sinks=sinks,
        hidden=None if hidden is None else torch.tensor(hidden, dtype=torch.int32),
        kv_format=kv_format,
    )


def random_format(rng: random.Random) -> KVFormat | None:
    """How a cache may store keys and values; as often as not in the dtype of the queries."""
    return rng.choice([None] * len(FORMATS) + [*FORMATS.values()])


def random_case(rng: random.Random, dtype: torch.dtype) -> AttentionCase:
    """Odd shapes and formats: decoding, prefill, chunks and idle sequences mixed."""
    lengths = []
    for _ in range(rng.randint(1, 5)):
        keys = rng.choice([1, 2, 15, 16, 17, 63, 64, 65, 100, 130])
        lengths.append((rng.choice([0, 1, 1, min(keys, 3), keys]), keys))
    limits = [(rng.choice([0, 1, 7, 64, 500]), rng.choice([0, 1, 4, 20, 70])) for _ in lengths]
    return make_case(
        lengths,
        kv_heads=rng.choice([1, 2, 3]),
        group=rng.choice([1, 3, 4, 8]),
        dims=rng.choice([16, 32, 64, 80, 96, 128]),
        block_size=rng.choice([1, 8, 16, 32, 128]),
        dtype=dtype,
        window=rng.choice([None, None, 1, 5, 40, 1000]),
        limits=rng.choice([None, limits]),
        kv_format=random_format(rng),
    )
