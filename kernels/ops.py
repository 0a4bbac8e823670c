"""Every operation that models need, one signature each: the only public surface of `kernels`.

Tensors on a CPU go to the native library where it could be built and knows the dtype; attention on a CUDA device goes
to Triton's kernels where Triton is installed and they know the dtype and the head dimension; all else goes to the torch
reference, which is also the oracle that the other two are tested against. The library is compiled at the first call,
unless `load` was called before; Triton is imported at the first that needs it. Whoever wants to choose for attention
names an `AttentionBackend`.

What is said to raise IndexError does on a CPU; on a GPU nobody looks, as that would mean to wait for it.

Letters in shapes: T query tokens of the flattened batch, B sequences, Hq and Hkv query and KV heads, D head dimension,
S slots per cache block, M columns of the block tables, R rotated dimensions.

Where an operation takes a `kv_format`, its caches hold rows of that format, [blocks, Hkv, S, W]; without one, values of
the queries' dtype, W = D. Rows are decoded in float32, and may be rounded to the queries' dtype.
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from kernels.attention_backend import AttentionBackend
from kernels.counted import Counted
from kernels.cpu import dense
from kernels.cpu.dense import LinearWeight
from kernels.cpu.library import load, native
from kernels.cpu.native import DTYPES, NativeOps
from kernels.cpu.packed_groups import PackedGroups, can_pack, pack
from kernels.group_quantized import GroupQuantized, stack
from kernels.kv_format import FORMATS as KV_FORMATS
from kernels.kv_format import KVFormat
from kernels.pruning import Pruning
from kernels.reference.attention_mass import attention_mass as reference_attention_mass
from kernels.reference.kv_write import kv_write as reference_kv_write
from kernels.reference.paged_attention import paged_attention as reference_paged_attention
from kernels.reference.pruned_attention import pruned_attention as reference_pruned_attention
from kernels.reference.rms_norm import rms_norm as reference_rms_norm
from kernels.reference.rotary_embedding import rotary_embedding as reference_rotary_embedding
from kernels.reference.silu_and_mul import silu_and_mul as reference_silu_and_mul
from kernels.sinks import Sinks

__all__ = [
    "KV_FORMATS",
    "AttentionBackend",
    "Counted",
    "GroupQuantized",
    "KVFormat",
    "PackedGroups",
    "Pruning",
    "Sinks",
    "attention_mass",
    "kv_write",
    "linear",
    "load",
    "pack_groups",
    "pack_linear",
    "paged_attention",
    "pruned_attention",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "stack",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Root-mean-square norm of the last dimension, after adding x to the residual stream if one is given.

    x [..., N] has 2 or 3 dimensions, the last of unit stride; weight [N] has x's dtype. With `residual` (like x),
    residual += x in place, rounded to its dtype, and the norm is taken of that. Returns contiguous [..., N] in x's
    dtype: (x · rsqrt(mean(x²) + eps)) computed in float32, rounded, then multiplied by the weight, as Hugging Face's
    Llama does.
    """
    if (ops := _native_for(x)) is not None:
        return ops.rms_norm(x, weight, eps, residual)
    return reference_rms_norm(x, weight, eps, residual)


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the first R dimensions of every head of q [T, Hq, D] and k [T, Hkv, D] in place.

    q and k may be strided views, with unit stride in D; cos and sin are float32 [T, R/2], R ≤ D. With x1 and x2 the
    halves of the R dimensions: x1' = x1·cos - x2·sin and x2' = x2·cos + x1·sin, computed in float32.
    """
    if (ops := _native_for(q)) is not None:
        return ops.rotary_embedding(q, k, cos, sin)
    return reference_rotary_embedding(q, k, cos, sin)


def kv_write(
    k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, kv_format: KVFormat | None = None
) -> None:
    """Write token t's key and value heads to cache slot `slots[t]`.

    k and v [T, Hkv, D] may be strided views, with unit stride in D; caches are contiguous [blocks, Hkv, S, W]; slots
    int64 [T] = block·S + offset, and negative means: write nowhere. Raises IndexError for a slot past the end.
    """
    if (ops := _native_for(k)) is not None:
        return ops.kv_write(k, v, key_cache, value_cache, slots, kv_format)
    return reference_kv_write(k, v, key_cache, value_cache, slots, kv_format)


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Sinks | None = None,
    hidden: Tensor | None = None,
    kv_format: KVFormat | None = None,
    backend: AttentionBackend | None = None,
) -> Tensor:
    """Causal attention of variable-length queries over the paged cache, in which this step's keys already lie.

    q [T, Hq, D] may be a strided view, with unit stride in D; caches are contiguous [blocks, Hkv, S, W].
    int32: block_tables [B, M], of which entries that a sequence does not need may hold anything; query_start [B + 1],
    where each sequence's rows of q begin, and there may be none; seq_lens [B], its keys, this step's included. Query i
    of sequence b stands at position p = seq_lens[b] - (query_start[b+1] - query_start[b]) + i and sees key j if j ≤ p
    and, with a window, p - j < window. Query head h reads KV head h // (Hq / Hkv). `sinks` sets further windows,
    sequence by sequence, and the first slots that are seen through them. `hidden` int32 [B, Hkv] says how many first
    slots nobody sees of a sequence at a KV head; query heads that see none at all get zeros.

    Returns contiguous [T, Hq, D] in q's dtype, accumulated in float32. Slots that no query of a sequence sees are not
    used, whatever they hold. Raises IndexError if a needed block does not exist, and ValueError if a ``backend`` is
    named that cannot do this.
    """
    if (kernels := _triton_for(q, backend)) is not None:
        out: Tensor = kernels.paged_attention(
            q, key_cache, value_cache, block_tables, query_start, seq_lens, scale, window, sinks, hidden, kv_format
        )
        return out
    if backend is None and (ops := _native_for(q)) is not None:
        return ops.paged_attention(
            q, key_cache, value_cache, block_tables, query_start, seq_lens, scale, window, sinks, hidden, kv_format
        )
    return reference_paged_attention(
        q, key_cache, value_cache, block_tables, query_start, seq_lens, scale, window, sinks, hidden, kv_format
    )


def attention_mass(
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
    backend: AttentionBackend | None = None,
) -> None:
    """Count the attention that each slot gets from this step's queries.

    The queries, tables, lengths and hidden slots are those of `paged_attention`, whose probabilities these are, without
    windows. mass float32 [blocks, Hkv, S] is paged like the keys: KV head h's entries grow by the sum over the queries
    that count and over the query heads that read h, on top of what is kept; see `Counted`.
    """
    if (kernels := _triton_for(q, backend)) is not None:
        kernels.attention_mass(
            q, key_cache, block_tables, query_start, seq_lens, scale, mass, counted, hidden, kv_format
        )
        return None
    if backend is None and (ops := _native_for(q)) is not None:
        return ops.attention_mass(
            q, key_cache, block_tables, query_start, seq_lens, scale, mass, counted, hidden, kv_format
        )
    return reference_attention_mass(
        q, key_cache, block_tables, query_start, seq_lens, scale, mass, counted, hidden, kv_format
    )


def pruned_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_len: int,
    scale: float,
    hidden: Tensor | None,
    pruning: Pruning,
    first_output: int,
    kv_format: KVFormat | None = None,
) -> Tensor:
    """One sequence's `paged_attention` with SpAtten's pruning; the same without, but for rounding, if there is none.

    q [T, Hq, D] are its queries of this step, block_table [M] int32, seq_len its keys; hidden int32 [Hkv]. Rows of q
    from ``first_output`` on begin with the high bits of queries and keys, if `pruning` says so; of every row the given
    share of values is left out. Returns contiguous [T, Hq, D] in q's dtype. The torch reference on every device: it
    computes what SpAtten's hardware would, but takes no less time than attention without pruning.
    """
    return reference_pruned_attention(
        q, key_cache, value_cache, block_table, seq_len, scale, hidden, pruning, first_output, kv_format
    )


def silu_and_mul(x: Tensor) -> Tensor:
    """x [T, 2·I], rows at any stride: contiguous [T, I] = silu(x[:, :I]) · x[:, I:], rounded after each of the two."""
    if (ops := _native_for(x)) is not None:
        return ops.silu_and_mul(x)
    return reference_silu_and_mul(x)


def pack_linear(weight: Tensor) -> LinearWeight:
    """Lay out a weight [N, K] for `linear`, once, at load time. The result may be opaque: it is for `linear` only."""
    return dense.pack_linear(weight)


def pack_groups(weight: GroupQuantized) -> PackedGroups | None:
    """Lay out a quantized weight for `linear`, once; None where this machine would have to dequantize it."""
    ops = native()
    return pack(weight) if ops is not None and ops.has_linear_groups and can_pack(weight) else None


def linear(x: Tensor, weight: LinearWeight | PackedGroups, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the transpose of a weight [N, K], packed or plain, plus bias [N]: [..., N] in x's dtype.

    Under a `PackedGroups`, x is rounded to 8 bits first, with a scale for every 32 inputs of a row: its largest
    magnitude / 127. Products of codes are exact, sums over groups in float32. A row with an infinity or NaN gives no
    finite number.
    """
    if x.dim() != 2:
        product = linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return product.view(*x.shape[:-1], product.shape[-1])
    if isinstance(weight, PackedGroups):
        ops = _native_for(x)
        assert ops is not None, "it packed the weight"
        return ops.linear_groups(x, weight, bias)
    return dense.linear(x, weight, bias)


def _native_for(x: Tensor) -> NativeOps | None:
    if not (x.is_cpu and x.dtype in DTYPES):
        return None
    torch.get_num_threads()  # makes OpenMP, which counts its threads per calling thread, follow torch.set_num_threads
    return native()


def _triton_for(q: Tensor, backend: AttentionBackend | None) -> Any:
    """`kernels.triton.ops`, where it is to compute attention. Raises ValueError if it was asked for and cannot."""
    if backend == "torch" or (backend is None and not q.is_cuda):
        return None
    kernels = _triton()
    if kernels is not None and kernels.supports(q.dtype, q.shape[-1]):
        return kernels
    if backend is None:
        return None
    lacking = "Triton is not installed" if kernels is None else f"no kernel for {q.dtype} and {q.shape[-1]} dimensions"
    raise ValueError(f"attention by triton: {lacking}")


@functools.cache
def _triton() -> Any:
    return None if importlib.util.find_spec("triton") is None else importlib.import_module("kernels.triton.ops")
