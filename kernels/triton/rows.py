"""How attention's rows, queries of heads, are cut into tiles, and keys into splits: from shapes alone, on the host."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor

from kernels.kv_format import KVFormat
from kernels.triton.gpu import GPU
from kernels.triton.launch_table import launch_parameters
from kernels.triton.variant import Constant

MAX_HEADS: Final = 64
"""Rows of the largest tile that one query may fill."""

MAX_SPLITS: Final = 64


@dataclass(frozen=True, slots=True)
class RowsShape:
    """A tile of rows, and how many of them there are."""

    kind: str
    """decode: no more queries than sequences; few: up to 8 times as many; prefill: more."""
    heads: int
    """Query heads that share a tile."""
    tiles: int
    tile: int
    """Slots at once."""
    num_warps: int
    num_stages: int
    format: str
    single_precision: bool
    constants: Mapping[str, Constant]


def rows_shape(q: Tensor, key_cache: Tensor, num_sequences: int, kv_format: KVFormat | None, gpu: GPU) -> RowsShape:
    """Tiles for queries q [T, Hq, D] on a cache [blocks, Hkv, S, W]."""
    tokens, q_heads, dims = q.shape
    group = q_heads // key_cache.shape[1]
    heads = next(heads for heads in range(min(group, MAX_HEADS), 0, -1) if group % heads == 0)
    kind = "decode" if tokens <= num_sequences else "few" if tokens <= 8 * num_sequences else "prefill"
    name = "plain" if kv_format is None or kv_format.dtype.is_floating_point else kv_format.name
    width = next(width for width in (64, 96, 128, 256) if dims <= width)
    work = "float32" if q.dtype is torch.float32 else "integer" if name in ("int8", "int4") else name
    parameters = launch_parameters("attention rows", gpu, f"{kind} {work} d{width}")
    least = heads if kind == "decode" else 4 * heads if kind == "few" else parameters["block_m"]
    block_m = max(16, triton.next_power_of_2(min(least, MAX_HEADS) if kind != "prefill" else max(least, heads)))
    queries = block_m // heads
    first, rest = _parts(dims, name)
    constants = {
        "D": dims,
        "D0": first,
        "P0": max(16, triton.next_power_of_2(first)),
        "P1": max(16, triton.next_power_of_2(rest)) if rest else 0,
        "W": key_cache.shape[3],
        "S": key_cache.shape[2],
        "FORMAT": name,
        "CODES": name != "plain" and q.dtype is not torch.float32,
        "CAST_FP8": name == "fp8" and gpu.capability >= (8, 9),
        "BLOCK_M": block_m,
        "TILE": parameters["tile"],
        "SEARCH": kind != "decode",
    }
    tiles = num_sequences if kind == "decode" else tokens // queries + num_sequences
    return RowsShape(
        kind,
        heads,
        tiles,
        parameters["tile"],
        parameters["num_warps"],
        parameters["num_stages"],
        name,
        q.dtype is torch.float32,
        constants,
    )


def num_splits(shape: RowsShape, gpu: GPU, q_heads: int, max_slots: int) -> int:
    """So many that every multiprocessor has two programs, if tiles alone do not do that; 4 tiles of slots or more each.

    It depends on how long sequences may be, not on how long they are: that is not known on the host.
    """
    programs = shape.tiles * (q_heads // shape.heads)
    if programs >= gpu.num_multiprocessors:
        return 1
    return max(1, min(2 * gpu.num_multiprocessors // programs, max_slots // (4 * shape.tile), MAX_SPLITS))


def aligned_rows(q: Tensor) -> Tensor:
    """q [T, heads, D], copied if rows begin elsewhere than at multiples of 16 elements; of a dimension of size 1 the
    stride does not matter."""
    _, heads, dims = q.shape
    strides = [stride if size > 1 else heads * dims for size, stride in zip(q.shape[:2], q.stride()[:2], strict=True)]
    if q.data_ptr() % 16 or any(stride % 16 for stride in strides):
        return q.contiguous() if not q.is_contiguous() else q.clone()
    return q.as_strided(q.shape, (*strides, 1))


def numbers_of(cache: Tensor, name: str) -> Tensor | None:
    """The cache as `kv_rows.load_scales` reads it."""
    return None if name == "plain" else cache.view(torch.float16 if name == "fp8" else torch.int32)


def _parts(dims: int, name: str) -> tuple[int, int]:
    """How many dimensions are in the first part of a head, and how many in the second."""
    if name == "int4":
        return dims // 2, dims // 2
    first = triton.next_power_of_2(dims + 1) // 2
    return first, dims - first
