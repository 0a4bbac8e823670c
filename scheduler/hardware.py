"""What a step takes by data-sheet figures: an estimate, for devices that nobody here has measured.

A token takes 2 operations per weight, and a step reads every weight once; attention takes 4 operations per query, key,
head and dimension (Kaplan et al. 2020, §2.1). Devices reach a share of their peak, which is an assumption.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from scheduler.cost_model import CostModel

_SHARE_OF_MEMORY: Final = 0.9
"""What is left to weights and KV once the runtime and the activations have theirs, as in `engine.memory`."""
_BYTES: Final = 2
"""Of a weight and of a value in the KV cache: bfloat16."""


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, by its data sheet."""

    flops: float
    """Operations per second of dense bfloat16 matrix products, without sparsity."""
    bandwidth: float
    """Bytes per second between memory and chip."""
    memory: float
    """Bytes."""
    link: float
    """Bytes per second between the device and the host, one way."""


DEVICES: Final[Mapping[str, Device]] = {
    "a100": Device(312e12, 2.039e12, 80e9, 32e9),  # SXM, 80 GB
    "h100": Device(989.4e12, 3.35e12, 80e9, 64e9),  # SXM
    "h200": Device(989.4e12, 4.8e12, 141e9, 64e9),  # SXM
    "l4": Device(121e12, 300e9, 24e9, 32e9),
    "l40s": Device(362e12, 864e9, 48e9, 32e9),
}
"""NVIDIA's data sheets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the cost of a dense decoder depends on: grouped-query attention and a gated MLP in every layer."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    """Whether the embedding is the output matrix too."""

    @property
    def layer_weights(self) -> int:
        """Weights that multiply every token, all layers together; norms and biases are too few to count."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def output_weights(self) -> int:
        """Weights that multiply every token after which one is sampled."""
        return self.hidden * self.vocabulary

    @property
    def weights(self) -> int:
        """All of them, which memory holds."""
        return self.layer_weights + (1 if self.tied else 2) * self.output_weights

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache that a token takes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _BYTES

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The shape that a Hugging Face config.json states. Raises ValueError, naming the field at fault."""
        heads = _count(config, "num_attention_heads")
        hidden = _count(config, "hidden_size")
        return cls(
            layers=_count(config, "num_hidden_layers"),
            hidden=hidden,
            intermediate=_count(config, "intermediate_size"),
            heads=heads,
            kv_heads=_count(config, "num_key_value_heads", heads),
            head_dim=_count(config, "head_dim", max(hidden // heads, 1)),
            vocabulary=_count(config, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
        )


def _count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, not a positive whole number")
    return value


def _shape(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False
) -> ModelShape:
    """A shape whose heads have the dimension that the hidden size leaves them."""
    return ModelShape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocabulary=vocabulary,
        tied=tied,
    )


MODELS: Final[Mapping[str, ModelShape]] = {
    "llama-3.1-8b": _shape(32, 4096, 14336, 32, 8, 128_256),
    "llama-3.1-70b": _shape(80, 8192, 28672, 64, 8, 128_256),
    "llama-3.2-1b": _shape(16, 2048, 8192, 32, 8, 128_256, tied=True),
    "llama-3.2-3b": _shape(28, 3072, 8192, 24, 8, 128_256, tied=True),
    "mistral-7b": _shape(32, 4096, 14336, 32, 8, 32_768),
    "qwen2.5-7b": _shape(28, 3584, 18944, 28, 4, 152_064),
    "qwen3-8b": _shape(36, 4096, 12288, 32, 8, 151_936),
    "smollm2-135m": _shape(30, 576, 1536, 9, 3, 49_152, tied=True),
}
"""After each model's config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What of a device's peak is reached: assumptions, typical of today's kernels, not measurements."""

    flops: float = 0.5
    bandwidth: float = 0.7
    """Of the memory, and of the link to the host."""
    overhead: float = 1e-3
    """Seconds that every step takes beside: launches, scheduling, sampling."""


def estimate(device: Device, model: ModelShape, reached: Efficiency, source: str = "") -> CostModel:
    """The cost of a step of ``model`` on ``device``."""
    flops, bandwidth = device.flops * reached.flops, device.bandwidth * reached.bandwidth
    per_token = 2 * model.layer_weights / flops
    read = model.layer_weights + model.output_weights  # a step looks up single rows of the embedding
    return CostModel(
        base=reached.overhead,
        per_token=per_token,
        knee=read * _BYTES / bandwidth / per_token,
        per_context_token=model.kv_bytes / bandwidth,
        per_pair=4 * model.layers * model.heads * model.head_dim / flops,
        per_sample=2 * model.output_weights / flops,
        per_moved_token=model.kv_bytes / (device.link * reached.bandwidth),
        source=source,
    )


def kv_tokens(device: Device, model: ModelShape) -> int:
    """Tokens of KV cache that the device has room for beside the weights; 0 or less: none."""
    free = device.memory * _SHARE_OF_MEMORY - model.weights * _BYTES
    return int(free // model.kv_bytes)
