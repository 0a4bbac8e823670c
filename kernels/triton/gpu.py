"""What planning a launch needs to know of a GPU, as data: without one at hand it can be that of another."""

import functools
from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True, slots=True)
class GPU:
    """A device that kernels are planned for."""

    capability: tuple[int, int]
    """NVIDIA's compute capability."""
    num_multiprocessors: int

    @property
    def architecture(self) -> str:
        """As compilers write it: sm_90."""
        return "sm_{}{}".format(*self.capability)


A100: Final = GPU((8, 0), 108)
H200: Final = GPU((9, 0), 132)

COMPILED_FOR: Final = (A100, H200)
"""What every variant is compiled for ahead of time."""


@functools.cache
def gpu_of(device: torch.device) -> GPU:
    """The GPU that tensors of this device are on. Raises ValueError if it is none."""
    if device.type != "cuda":
        raise ValueError(f"Triton kernels run on a CUDA device, not on {device}")
    properties = torch.cuda.get_device_properties(device)
    return GPU((properties.major, properties.minor), properties.multi_processor_count)
