"""Dense matrix multiplication on CPUs, over weights that oneDNN has laid out for its kernels once, at load time.

Measured with torch 2.13 on 2 cores of Zen 5, over the 120 matrices of SmolLM2-135M's layers, plain against packed:
bfloat16 12.5 and 7.5 ms for 1 row, 18.0 and 13.4 for 32, 270 and 319 for 1024; float32 27 and 14 for 1 row, 61 and 27
for 32, 1209 and 509 for 1024. Unpacking for many bfloat16 rows would win back only half of what is lost there.
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear


@functools.cache
def _packable_dtypes() -> frozenset[torch.dtype]:
    """The dtypes whose weights this build of torch can prepack, and which this CPU multiplies natively."""
    mkldnn = torch.ops.mkldnn
    needed = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not (torch.backends.mkldnn.is_available() and all(hasattr(mkldnn, name) for name in needed)):
        return frozenset()
    return frozenset([torch.float32] + [torch.bfloat16] * mkldnn._is_mkldnn_bf16_supported())


def pack_linear(weight: Tensor) -> Tensor:
    """Reorder a weight [N, K] for `linear`; returned unchanged where packing is not possible."""
    if weight.device.type != "cpu" or weight.dtype not in _packable_dtypes():
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the transpose of a plain or packed weight [N, K], plus bias [N]: [..., N]."""
    if packed.is_mkldnn:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return product
    return torch_linear(x, packed, bias)
