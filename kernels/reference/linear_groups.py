import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from kernels.group_quantized import GroupQuantized

ACTIVATION_GROUP = 32
"""Inputs that share a scale when activations are quantized."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] → int8 codes [T, K] and float32 scales [T, K / 32]: symmetric, to the nearest, ties to even."""
    groups = x.float().unflatten(-1, (-1, ACTIVATION_GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = largest.new_tensor(127) / largest  # with a plain 127, torch would multiply by the reciprocal
    codes = (groups * torch.where(largest > 0, inverse, 0)).round().to(torch.int8)
    return codes.flatten(-2), (largest / 127).squeeze(-1)


def linear_groups(x: Tensor, weight: GroupQuantized, bias: Tensor | None) -> Tensor:
    """See `kernels.ops.linear`: of the rounded activations, in float64."""
    codes, scale = quantize_rows(x)
    rounded = (codes.unflatten(-1, (-1, ACTIVATION_GROUP)).double() * scale.double().unsqueeze(-1)).flatten(-2)
    return torch_linear(rounded, weight.dequantize().double(), None if bias is None else bias.double()).to(x.dtype)
