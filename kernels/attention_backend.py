"""Who computes attention, where that is not left to the device that its tensors are on."""

from typing import Literal

AttentionBackend = Literal["triton", "torch"]
"""triton: our kernels, on a CUDA device; torch: the reference, anywhere."""
