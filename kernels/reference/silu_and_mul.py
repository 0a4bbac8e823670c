"""The gate of a SwiGLU feed-forward layer (Shazeer 2020, eq. 6)."""

from torch import Tensor
from torch.nn.functional import silu


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(first half) · second half of the last dimension; see `kernels.ops.silu_and_mul`."""
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up
