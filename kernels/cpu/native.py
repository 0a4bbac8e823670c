"""The native library's functions as operations on torch tensors.

Each function takes one struct, packed here from pointers, strides (in elements) and sizes: for 19 numbers that costs
0.4 µs, where as many ctypes arguments cost 1.6 µs. A decoding step makes about 150 of these calls, so checks are cheap
too: those that keep native code inside its tensors.
"""

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kernels.counted import Counted
from kernels.cpu.packed_groups import PackedGroups
from kernels.kv_format import KVFormat
from kernels.sinks import Sinks

DTYPES: Final = {torch.float32: "f32", torch.bfloat16: "bf16"}

# The fields of each Arguments struct in the .cpp files: q for pointers and integers, d for doubles.
_RMS_NORM: Final = struct.Struct("3q 3q 2q 3q d")
_ROTARY_EMBEDDING: Final = struct.Struct("4q 4q 2q 2q 2q")
_KV_WRITE: Final = struct.Struct("3q 3q 2q q 6q q")
_PAGED_ATTENTION: Final = struct.Struct("3q 2q 2q 2q q 7q d q 5q q 2q")
_ATTENTION_MASS: Final = struct.Struct("3q q 2q 2q 3q 7q d q 2q")
_SILU_AND_MUL: Final = struct.Struct("2q q 2q")
_LINEAR: Final = struct.Struct("2q 3q 3q")
_PACK_LINEAR: Final = struct.Struct("2q 2q")
_LINEAR_GROUPS: Final = struct.Struct("2q 3q 5q")

Function = Callable[[bytes], int]

_NO_SINKS: Final = 0, 0, 0, 0, 0

_KV_FORMATS: Final = {"bf16": 1, "fp16": 2, "fp8": 3, "int8": 4, "int4": 5}
"""The numbers of the formats in `kv_rows.h`; 0 is the queries' dtype."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A bfloat16 weight [outputs, inputs] in the layout of `linear_bf16.cpp`."""

    panels: Tensor
    inputs: int
    outputs: int


class NativeOps:
    """The operations of one opened library, for tensors on the CPU of a dtype in `DTYPES`; see `kernels.ops`.

    All raise ValueError for shapes, strides or dtypes that do not fit each other.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Raises AttributeError if the library lacks a function."""
        self._rms_norm = _bind_each(library, "octavo_rms_norm")
        self._rotary_embedding = _bind_each(library, "octavo_rotary_embedding")
        self._silu_and_mul = _bind_each(library, "octavo_silu_and_mul")
        self._paged_attention = _bind_each(library, "octavo_paged_attention")
        self._attention_mass = _bind_each(library, "octavo_attention_mass")
        self._kv_write = _bind(library, "octavo_kv_write")
        self._kv_encode = _bind_each(library, "octavo_kv_encode")
        self.has_linear = hasattr(library, "octavo_linear_bf16")
        """Whether the CPU multiplies pairs of bfloat16, so that the two functions below exist."""
        if self.has_linear:
            self._linear = _bind(library, "octavo_linear_bf16")
            self._pack_linear = _bind(library, "octavo_pack_linear_bf16")
        self.has_linear_groups = hasattr(library, "octavo_linear_groups_bf16")
        """Whether the CPU has AVX2 at least, so that the function below exists."""
        if self.has_linear_groups:
            self._linear_groups = _bind_each(library, "octavo_linear_groups")

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
        dtype, shape = x.dtype, x.shape
        outer, inner = (1, shape[0]) if len(shape) == 2 else shape[:2]
        n = shape[-1]
        if weight.dtype is not dtype or weight.shape != (n,):
            raise ValueError(f"rms_norm: weight {_describe(weight)} does not fit x {_describe(x)}")
        addend = 0, 0, 0
        if residual is not None:
            if residual.dtype is not dtype or residual.shape != shape:
                raise ValueError(f"rms_norm: residual {_describe(residual)} does not fit x {_describe(x)}")
            addend = residual.data_ptr(), *_row_strides(residual)
        out = torch.empty(shape, dtype=dtype)
        self._rms_norm[dtype](
            _RMS_NORM.pack(
                x.data_ptr(), *_row_strides(x), *addend, weight.data_ptr(), out.data_ptr(), outer, inner, n, eps
            )
        )
        return out

    def rotary_embedding(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        tokens, q_heads, dims = q.shape
        k_tokens, k_heads, k_dims = k.shape
        half = cos.shape[1]
        q_token, q_head, q_step = q.stride()
        k_token, k_head, k_step = k.stride()
        cos_token, cos_step = cos.stride()
        sin_token, sin_step = sin.stride()
        if not (q_step == k_step == cos_step == sin_step == 1):
            raise ValueError("rotary_embedding: last dimensions must have unit stride")
        if not (q.dtype is k.dtype and cos.dtype is sin.dtype is torch.float32):
            raise ValueError("rotary_embedding: q and k must share a dtype, cos and sin be float32")
        if not (tokens == k_tokens == cos.shape[0] and cos.shape == sin.shape and dims == k_dims >= 2 * half):
            raise ValueError(f"rotary_embedding: shapes {q.shape}, {k.shape}, {cos.shape}, {sin.shape} do not fit")
        self._rotary_embedding[q.dtype](
            _ROTARY_EMBEDDING.pack(
                q.data_ptr(), q_token, q_head, q_heads, k.data_ptr(), k_token, k_head, k_heads,
                cos.data_ptr(), cos_token, sin.data_ptr(), sin_token, tokens, half,
            )
        )  # fmt: skip

    def kv_write(
        self,
        k: Tensor,
        v: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        kv_format: KVFormat | None = None,
    ) -> None:
        tokens, heads, dims = shape = k.shape
        blocks, cache_heads, block_size, cache_width = key_cache.shape
        k_token, k_head, k_step = k.stride()
        v_token, v_head, v_step = v.stride()
        if not (k_step == v_step == 1 and slots.stride() == (1,) and _are_contiguous(key_cache, value_cache)):
            raise ValueError("kv_write: caches and slots must be contiguous, k and v have unit stride in D")
        stored, width, number = _stored(k.dtype, dims, kv_format)
        if not (k.dtype is v.dtype and stored is key_cache.dtype is value_cache.dtype and slots.dtype is torch.int64):
            raise ValueError(f"kv_write: k and v must share a dtype, the caches be {stored}, slots int64")
        if not (v.shape == shape and slots.shape[0] == tokens and (heads, width) == (cache_heads, cache_width)):
            raise ValueError(f"kv_write: shapes {shape}, {v.shape}, {key_cache.shape}, {slots.shape} do not fit")
        size = k.itemsize
        outside = (self._kv_encode[k.dtype] if number else self._kv_write)(
            _KV_WRITE.pack(
                k.data_ptr(), k_token * size, k_head * size, v.data_ptr(), v_token * size, v_head * size,
                key_cache.data_ptr(), value_cache.data_ptr(), slots.data_ptr(),
                tokens, heads, dims, width * stored.itemsize, block_size, blocks, number,
            )
        )  # fmt: skip
        if outside:
            raise IndexError(f"kv_write: {outside} slots lie past the cache's {blocks} blocks")

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        scale: float,
        window: int | None,
        sinks: Sinks | None = None,
        hidden: Tensor | None = None,
        kv_format: KVFormat | None = None,
    ) -> Tensor:
        _, q_heads, dims = shape = q.shape
        blocks, kv_heads, block_size, cache_width = key_cache.shape
        sequences, table_blocks = block_tables.shape
        q_token, q_head, q_step = q.stride()
        table_stride, table_step = block_tables.stride()
        dtype = q.dtype
        stored, width, number = _stored(dtype, dims, kv_format)
        if not (q_step == table_step == 1 and _are_contiguous(key_cache, value_cache)):
            raise ValueError("paged_attention: caches must be contiguous, q have unit stride in D, tables in M")
        if not (stored is key_cache.dtype is value_cache.dtype):
            raise ValueError(
                f"paged_attention: q is {dtype}, the caches {key_cache.dtype} and {value_cache.dtype}, not {stored}"
            )
        if not (block_tables.dtype is query_start.dtype is seq_lens.dtype is torch.int32):
            raise ValueError("paged_attention: block_tables, query_start and seq_lens must be int32")
        if not (
            width == cache_width and q_heads % kv_heads == 0 and value_cache.shape == key_cache.shape
            and query_start.shape[0] == sequences + 1 and seq_lens.shape[0] == sequences
        ):  # fmt: skip
            raise ValueError(
                f"paged_attention: shapes {shape}, {key_cache.shape}, {value_cache.shape}, {block_tables.shape}, "
                f"{query_start.shape}, {seq_lens.shape} do not fit"
            )
        out = torch.empty(shape, dtype=dtype)
        sound = self._paged_attention[dtype](
            _PAGED_ATTENTION.pack(
                q.data_ptr(), q_token, q_head, key_cache.data_ptr(), value_cache.data_ptr(),
                block_tables.data_ptr(), table_stride, query_start.data_ptr(), seq_lens.data_ptr(), out.data_ptr(),
                sequences, q_heads, kv_heads, dims, block_size, blocks, table_blocks, scale, window or 0,
                *(_NO_SINKS if sinks is None else _sinks(sinks, q, sequences)),
                0 if hidden is None else _per_head(hidden, sequences, kv_heads),
                number, width * stored.itemsize,
            )
        )  # fmt: skip
        if not sound:
            raise IndexError(
                f"paged_attention: a sequence needs a block that is not in its table or past {blocks} blocks"
            )
        return out

    def attention_mass(
        self,
        q: Tensor,
        key_cache: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        scale: float,
        mass: Tensor,
        counted: Counted,
        hidden: Tensor | None = None,
        kv_format: KVFormat | None = None,
    ) -> None:
        _, q_heads, dims = q.shape
        blocks, kv_heads, block_size, cache_width = key_cache.shape
        sequences, table_blocks = block_tables.shape
        q_token, q_head, q_step = q.stride()
        table_stride, table_step = block_tables.stride()
        if not (q_step == table_step == 1 and _are_contiguous(key_cache, mass, *counted)):
            raise ValueError("attention_mass: cache, mass and counts must be contiguous, q have unit stride in D")
        stored, width, number = _stored(q.dtype, dims, kv_format)
        if not (stored is key_cache.dtype and mass.dtype is torch.float32):
            raise ValueError(f"attention_mass: the cache must be {stored}, mass float32")
        if not all(x.dtype is torch.int32 for x in (block_tables, query_start, seq_lens, *counted)):
            raise ValueError("attention_mass: block_tables, query_start, seq_lens and counts must be int32")
        if not (
            width == cache_width and q_heads % kv_heads == 0 and mass.shape == key_cache.shape[:3]
            and query_start.shape[0] == sequences + 1
            and all(x.shape == (sequences,) for x in (seq_lens, *counted))
        ):  # fmt: skip
            raise ValueError(
                f"attention_mass: shapes {q.shape}, {key_cache.shape}, {block_tables.shape}, {query_start.shape}, "
                f"{seq_lens.shape}, {mass.shape}, {counted.first.shape} do not fit"
            )
        sound = self._attention_mass[q.dtype](
            _ATTENTION_MASS.pack(
                q.data_ptr(), q_token, q_head, key_cache.data_ptr(), block_tables.data_ptr(), table_stride,
                query_start.data_ptr(), seq_lens.data_ptr(), mass.data_ptr(),
                counted.first.data_ptr(), counted.kept.data_ptr(),
                sequences, q_heads, kv_heads, dims, block_size, blocks, table_blocks, scale,
                0 if hidden is None else _per_head(hidden, sequences, kv_heads),
                number, width * stored.itemsize,
            )
        )  # fmt: skip
        if not sound:
            raise IndexError(
                f"attention_mass: a sequence needs a block that is not in its table or past {blocks} blocks"
            )

    def silu_and_mul(self, x: Tensor) -> Tensor:
        rows, width = x.shape
        row_stride, step = x.stride()
        if step != 1 or width % 2:
            raise ValueError(f"silu_and_mul: x {_describe(x)} must have an even width and unit stride in it")
        n = width // 2
        dtype = x.dtype
        out = torch.empty((rows, n), dtype=dtype)
        self._silu_and_mul[dtype](_SILU_AND_MUL.pack(x.data_ptr(), row_stride, out.data_ptr(), rows, n))
        return out

    def pack_linear(self, weight: Tensor) -> PackedWeight:
        weight = weight.detach().contiguous()
        outputs, inputs = weight.shape
        panels = torch.empty((-(-outputs // 32), -(-inputs // 2), 32, 2), dtype=torch.bfloat16)
        self._pack_linear(_PACK_LINEAR.pack(weight.data_ptr(), panels.data_ptr(), inputs, outputs))
        return PackedWeight(panels, inputs, outputs)

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        rows, inputs = x.shape
        outputs = weight.outputs
        row_stride, step = x.stride()
        if x.dtype is not torch.bfloat16 or inputs != weight.inputs or step != 1:
            raise ValueError(f"linear: x {_describe(x)} does not fit a bfloat16 weight of {weight.inputs} inputs")
        if bias is not None and (bias.dtype is not torch.bfloat16 or bias.shape != (outputs,) or bias.stride() != (1,)):
            raise ValueError(f"linear: bias {_describe(bias)} does not fit a bfloat16 weight of {outputs} outputs")
        out = torch.empty((rows, outputs), dtype=torch.bfloat16)
        self._linear(
            _LINEAR.pack(
                x.data_ptr(), row_stride, weight.panels.data_ptr(), 0 if bias is None else bias.data_ptr(),
                out.data_ptr(), rows, inputs, outputs,
            )
        )  # fmt: skip
        return out

    def linear_groups(self, x: Tensor, weight: PackedGroups, bias: Tensor | None) -> Tensor:
        rows, inputs = x.shape
        outputs = weight.outputs
        row_stride, step = x.stride()
        if inputs != weight.inputs or step != 1:
            raise ValueError(f"linear: x {_describe(x)} does not fit a weight of {weight.inputs} inputs")
        if bias is not None and (bias.dtype is not x.dtype or bias.shape != (outputs,) or bias.stride() != (1,)):
            raise ValueError(f"linear: bias {_describe(bias)} does not fit x {_describe(x)} and {outputs} outputs")
        out = torch.empty((rows, outputs), dtype=x.dtype)
        self._linear_groups[x.dtype](
            _LINEAR_GROUPS.pack(
                x.data_ptr(), row_stride, weight.panels.data_ptr(), 0 if bias is None else bias.data_ptr(),
                out.data_ptr(), rows, inputs, outputs, weight.bits, weight.has_minimum,
            )
        )  # fmt: skip
        return out


def _bind(library: ctypes.CDLL, name: str) -> Function:
    function = getattr(library, name)
    function.argtypes = [ctypes.c_char_p]
    function.restype = ctypes.c_int64
    bound: Function = function
    return bound


def _bind_each(library: ctypes.CDLL, name: str) -> dict[torch.dtype, Function]:
    return {dtype: _bind(library, f"{name}_{suffix}") for dtype, suffix in DTYPES.items()}


def _stored(dtype: torch.dtype, dims: int, kv_format: KVFormat | None) -> tuple[torch.dtype, int, int]:
    """What cache rows are made of, how many of it, and the format's number, beside queries of a dtype."""
    if kv_format is None or kv_format.dtype is dtype:
        return dtype, dims, 0
    return kv_format.dtype, kv_format.row_width(dims), _KV_FORMATS[kv_format.name]


def _sinks(sinks: Sinks, q: Tensor, sequences: int) -> tuple[int, int, int, int, int]:
    """Pointers to the windows, the counts and the queries of the sinks, and the latter's strides."""
    token, head, step = sinks.q.stride()
    for limits in (sinks.windows, sinks.counts):
        if limits.dtype is not torch.int32 or limits.shape != (sequences,) or not limits.is_contiguous():
            raise ValueError(f"paged_attention: limits {_describe(limits)} do not fit {sequences} sequences")
    if sinks.q.shape != q.shape or sinks.q.dtype is not q.dtype or step != 1:
        raise ValueError(f"paged_attention: the sinks' q {_describe(sinks.q)} does not fit q {_describe(q)}")
    return sinks.windows.data_ptr(), sinks.counts.data_ptr(), sinks.q.data_ptr(), token, head


def _per_head(hidden: Tensor, sequences: int, kv_heads: int) -> int:
    """Pointer to a number for each sequence and KV head."""
    if hidden.dtype is not torch.int32 or hidden.shape != (sequences, kv_heads) or not hidden.is_contiguous():
        raise ValueError(f"attention: hidden slots {_describe(hidden)} do not fit {sequences} x {kv_heads}")
    return hidden.data_ptr()


def _are_contiguous(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def _row_strides(x: Tensor) -> tuple[int, int]:
    """The strides of a matrix's rows, or of a stack of matrices: outer, inner."""
    *outer, inner, step = x.stride()
    if step != 1:
        raise ValueError(f"rms_norm: {_describe(x)} must have unit stride in its last dimension")
    return (outer[0] if outer else 0), inner


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} strides {x.stride()}"
