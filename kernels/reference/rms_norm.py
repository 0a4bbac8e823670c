"""Root-mean-square layer norm (Zhang & Sennrich 2019, eq. 4), with the residual addition that precedes it."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Norm over the last dimension; see `kernels.ops.rms_norm`."""
    if residual is not None:
        residual += x
        x = residual
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return ((wide * scale).to(x.dtype) * weight).contiguous()
