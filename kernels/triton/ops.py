"""The operations that Triton computes, for `kernels/ops.py`. Importing this imports Triton, and does nothing else."""

from kernels.triton.arguments import supports
from kernels.triton.attention_mass import attention_mass
from kernels.triton.paged_attention import paged_attention

__all__ = ["attention_mass", "paged_attention", "supports"]
