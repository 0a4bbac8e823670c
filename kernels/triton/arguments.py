"""Checks of what attention is given: those that keep kernels inside their tensors, as far as shapes can tell."""

import torch
from torch import Tensor

from kernels.kv_format import KVFormat
from kernels.sinks import Sinks

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(dtype: torch.dtype, dims: int) -> bool:
    """Whether attention's kernels take queries of this dtype and head dimension."""
    return dtype in DTYPES and dims % 16 == 0 and 16 <= dims <= 256


def check_paged(
    q: Tensor,
    key_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    hidden: Tensor | None,
    kv_format: KVFormat | None,
    value_cache: Tensor | None = None,
) -> None:
    """Raises ValueError where shapes, strides or dtypes do not fit each other."""
    caches = [key_cache] if value_cache is None else [key_cache, value_cache]
    stored, width = (q.dtype, q.shape[2]) if kv_format is None else (kv_format.dtype, kv_format.row_width(q.shape[2]))
    sequences = len(seq_lens)
    _require(supports(q.dtype, q.shape[2]), f"q {_describe(q)} must have 16, 32, … 256 dimensions")
    _require(q.stride(2) == 1, f"q {_describe(q)} must have unit stride in its last dimension")
    for cache in caches:
        _require(cache.is_contiguous(), "caches must be contiguous")
        _require(cache.dtype is stored, f"q is {q.dtype}, a cache {cache.dtype}, not {stored}")
        fits = cache.shape == key_cache.shape and cache.shape[3] == width and q.shape[1] % cache.shape[1] == 0
        _require(fits, f"cache {_describe(cache)} does not fit q {_describe(q)}")
    check_counts(block_tables, sequences, block_tables.shape[1])
    check_counts(query_start, sequences + 1)
    check_counts(seq_lens, sequences)
    if hidden is not None:
        check_counts(hidden, sequences, key_cache.shape[1])
        _require(hidden.is_contiguous(), "hidden slots must be contiguous")


def check_sinks(sinks: Sinks | None, q: Tensor, sequences: int) -> None:
    """Raises ValueError where they do not fit the queries."""
    if sinks is None:
        return
    check_counts(sinks.windows, sequences)
    check_counts(sinks.counts, sequences)
    fits = sinks.q.shape == q.shape and sinks.q.dtype is q.dtype and sinks.q.stride(2) == 1
    _require(fits, f"the sinks' q {_describe(sinks.q)} does not fit q {_describe(q)}")


def check_mass(mass: Tensor, key_cache: Tensor) -> None:
    """Raises ValueError unless there is a float32 for each row of the cache."""
    fits = mass.dtype is torch.float32 and mass.shape == key_cache.shape[:3] and mass.is_contiguous()
    _require(fits, f"mass {_describe(mass)} does not fit cache {_describe(key_cache)}")


def check_counts(x: Tensor, *shape: int) -> None:
    """Raises ValueError unless x is int32 of this shape, with unit stride in the last dimension."""
    fits = x.dtype is torch.int32 and x.shape == shape and (x.shape[-1] < 2 or x.stride(-1) == 1)
    _require(fits, f"{_describe(x)} should be int32 {shape} with unit stride in its last dimension")


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(f"attention: {message}")


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} strides {x.stride()}"
