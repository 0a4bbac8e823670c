"""Dense matrix multiplication on CPUs, over weights laid out once, at load time.

bfloat16 goes to our own kernel where the CPU multiplies pairs of bfloat16 but has no AMX; all else to oneDNN, through
torch. Measured with torch 2.13 on 2 cores of Zen 5 (AVX-512-BF16), milliseconds for the 120 matrices of SmolLM2-135M's
layers by rows, in one run:

    rows                     1      8     32     64    256
    torch, plain          11.2   14.4   16.6   25.6   73.2
    oneDNN, prepacked      6.2    7.3   12.8   20.8   61.7
    ours                   5.6    6.0   10.2   17.3   61.2

(plain: another run of the same day). float32: prepacked 14 and plain 27 for 1 row, 509 and 1209 for 1024.
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from kernels.cpu.library import native
from kernels.cpu.native import NativeOps, PackedWeight

LinearWeight = Tensor | PackedWeight
"""A weight as `linear` takes it: plain [N, K], packed by oneDNN, or packed for our own kernel."""


@functools.cache
def _onednn_dtypes() -> frozenset[torch.dtype]:
    """The dtypes whose weights this build of torch can prepack, and which this CPU multiplies natively."""
    mkldnn = torch.ops.mkldnn
    needed = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not (torch.backends.mkldnn.is_available() and all(hasattr(mkldnn, name) for name in needed)):
        return frozenset()
    return frozenset([torch.float32] + [torch.bfloat16] * mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def _own_kernel() -> NativeOps | None:
    """The native library, where its matmul is the one to take. oneDNN uses AMX where there is any; ours does not."""
    ops = native()
    return ops if ops is not None and ops.has_linear and not torch.cpu._is_amx_tile_supported() else None


def pack_linear(weight: Tensor) -> LinearWeight:
    """Reorder a weight [N, K] for `linear`; returned unchanged where packing is not possible."""
    if weight.device.type != "cpu":
        return weight
    if weight.dtype == torch.bfloat16 and (ops := _own_kernel()) is not None:
        return ops.pack_linear(weight)
    if weight.dtype not in _onednn_dtypes():
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return packed


def linear(x: Tensor, weight: LinearWeight, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times the transpose of a weight [N, K] as `pack_linear` returned it, plus bias [N]: [T, N]."""
    if isinstance(weight, PackedWeight):
        ops = _own_kernel()
        assert ops is not None, "it packed the weight"
        torch.get_num_threads()  # as in kernels.ops: makes OpenMP follow torch.set_num_threads in this thread too
        return ops.linear(x, weight, bias)
    if weight.is_mkldnn:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return torch_linear(x, weight, bias)
