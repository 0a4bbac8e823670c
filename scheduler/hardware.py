"""What a step takes by data-sheet figures: an estimate, for devices that nobody here has measured.

A token takes 2 operations per weight, and a step reads every weight once; attention takes 4 operations per query, key,
head and dimension (Kaplan et al. 2020, §2.1). Devices reach a share of their peak, which is an assumption, and a flag.
"""

from dataclasses import dataclass
from typing import Final

from scheduler.cost_model import CostModel

_SHARE_OF_MEMORY: Final = 0.9
"""What is left to weights and KV once the runtime and the activations have theirs, as in `engine.memory`."""


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, by its data sheet."""

    flops: float
    """Operations per second of dense bfloat16 matrix products, without sparsity."""
    bandwidth: float
    """Bytes per second between memory and chip."""
    memory: float
    """Bytes."""


DEVICES: Final = {
    "a100": Device(312e12, 2.039e12, 80e9),  # SXM, 80 GB
    "h100": Device(989.4e12, 3.35e12, 80e9),  # SXM
    "h200": Device(989.4e12, 4.8e12, 141e9),  # SXM
    "l40s": Device(362e12, 864e9, 48e9),
}
"""NVIDIA's data sheets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the cost of a dense decoder depends on."""

    params: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    weight_bytes: float = 2.0
    """Bytes per weight; 1 for 8-bit weights that are computed in 16."""
    kv_bytes: float = 2.0
    """Bytes per value of the KV cache."""

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of KV cache that a token takes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes


LLAMA_3_8B: Final = ModelShape(params=8.03e9, layers=32, heads=32, kv_heads=8, head_dim=128)
"""Llama 3.1 8B, after its config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What of a device's peak is reached: assumptions, typical of today's kernels, not measurements."""

    flops: float = 0.5
    bandwidth: float = 0.7
    overhead: float = 1e-3
    """Seconds that every step takes beside: launches, scheduling, sampling."""


def estimate(name: str, model: ModelShape, efficiency: Efficiency | None = None) -> CostModel:
    """The cost of a step of ``model`` on the device of that name in `DEVICES`."""
    device, reached = DEVICES[name], efficiency or Efficiency()
    flops, bandwidth = device.flops * reached.flops, device.bandwidth * reached.bandwidth
    per_token = 2 * model.params / flops
    return CostModel(
        base=reached.overhead,
        per_token=per_token,
        knee=model.params * model.weight_bytes / bandwidth / per_token,
        per_context_token=model.kv_bytes_per_token / bandwidth,
        per_pair=4 * model.layers * model.heads * model.head_dim / flops,
        source=f"estimate for {model.params / 1e9:.3g}B parameters on {name} from data-sheet figures "
        f"({reached.flops:.0%} of peak FLOP/s, {reached.bandwidth:.0%} of bandwidth), not a measurement",
    )


def kv_tokens(name: str, model: ModelShape) -> int:
    """Tokens of KV cache that the device of that name has room for beside the weights; 0 or less: none."""
    free = DEVICES[name].memory * _SHARE_OF_MEMORY - model.params * model.weight_bytes
    return int(free // model.kv_bytes_per_token)
