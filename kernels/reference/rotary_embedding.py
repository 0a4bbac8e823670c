"""Rotary position embedding (Su et al. 2021, §3.4.2), half-split as in GPT-NeoX and Hugging Face's models."""

import torch
from torch import Tensor


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the first 2·cos.shape[1] dimensions of every head in place; see `kernels.ops.rotary_embedding`."""
    half = cos.shape[1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    for heads in (q, k):
        first, second = heads[..., :half], heads[..., half : 2 * half]
        x1, x2 = first.to(torch.float32), second.to(torch.float32)
        turned = x1 * cos - x2 * sin, x2 * cos + x1 * sin  # both before either overwrites x1, x2: they may be views
        first.copy_(turned[0])
        second.copy_(turned[1])
