"""The layout of group-quantized weights that `linear_groups.cpp` multiplies: packing, and its exact inverse.

Panels of 16 outputs; in each, for every 32 inputs: codes, scales, and minimums if there are any. A vector of codes, 64
bytes, holds four inputs of each output; of 4 bits, inputs k … k + 3 in the low halves and k + 4 … k + 7 in the high.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.group_quantized import GroupQuantized

PANEL = 16
GROUP = 32


@dataclass(frozen=True, slots=True)
class PackedGroups:
    """A weight [outputs, inputs], packed."""

    panels: Tensor
    """uint8 [outputs / 16 rounded up, inputs / 32, bytes of a group in a panel]."""
    inputs: int
    outputs: int
    bits: int
    has_minimum: bool

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return self.panels.nbytes


def can_pack(weight: GroupQuantized) -> bool:
    """Whether the weight's groups are whole multiples of 32 inputs."""
    inputs, groups = weight.codes.shape[1], weight.scale.shape[1]
    return inputs % groups == 0 and inputs // groups % GROUP == 0


def pack(weight: GroupQuantized) -> PackedGroups:
    """Lay a weight out. Larger groups are split into 32 inputs each. Raises ValueError for others."""
    if not can_pack(weight):
        raise ValueError(f"groups of {weight.codes.shape[1] / weight.scale.shape[1]:g} inputs are not multiples of 32")
    outputs, inputs = weight.codes.shape
    codes = _panels(weight.codes).view(-1, PANEL, inputs // GROUP, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    if weight.bits == 4:
        codes = codes[:, :, ::2] | codes[:, :, 1::2] << 4
    per_output = [part for part in (weight.scale, weight.minimum) if part is not None]
    parts = [codes.flatten(2)]
    for part in per_output:
        split = part.repeat_interleave(inputs // GROUP // part.shape[1], dim=1)
        parts.append(_panels(split).view(-1, PANEL, inputs // GROUP).transpose(1, 2).contiguous().view(torch.uint8))
    return PackedGroups(torch.cat(parts, dim=2), inputs, outputs, weight.bits, weight.minimum is not None)


def unpack(packed: PackedGroups) -> GroupQuantized:
    """The weight that was packed, in groups of 32."""
    size = PANEL * GROUP * packed.bits // 8
    codes = packed.panels[:, :, :size].unflatten(2, (-1, PANEL, 4))
    if packed.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=3).flatten(2, 3)
    codes = codes.permute(0, 3, 1, 2, 4).reshape(-1, packed.inputs)[: packed.outputs]
    halves = packed.panels[:, :, size:].contiguous().view(torch.float16).unflatten(2, (-1, PANEL)).permute(2, 0, 3, 1)
    scale, *minimum = halves.reshape(len(halves), -1, packed.inputs // GROUP)[:, : packed.outputs]
    return GroupQuantized(codes.contiguous(), scale, minimum[0] if minimum else None, packed.bits)


def _panels(x: Tensor) -> Tensor:
    """Rows of zeros added, so that every panel is whole."""
    return pad(x, (0, 0, 0, -len(x) % PANEL))
