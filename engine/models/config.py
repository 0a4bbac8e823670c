"""A decoder's shape, read from a config.json and checked: what the model, the KV cache and the limits follow from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError
from engine.layers.rope import RopeConfig

_MAX_FIELD = 1 << 27
"""No dimension of a real model is larger; what is, is a broken or hostile file."""

_ROPE_NUMBERS = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder with rotary grouped-query attention and a gated SiLU MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    max_position: int
    """The context length in tokens that the file promises, RoPE scaling included."""
    tie_embeddings: bool
    windows: tuple[int | None, ...]
    """Each layer's sliding window in tokens; None where it sees everything."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm of each query and key head before the rotation (Qwen3)."""

    @property
    def kv_rows_per_token(self) -> int:
        """Keys and values, each of one head, in the KV cache for one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads


class Fields:
    """A config.json's fields, read with their types checked: a wrong one is one clear line."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_FIELD:
            raise CheckpointError(f"config.json: {name} is {value!r}, not a positive whole number of a sane size")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise CheckpointError(f"config.json: {name} is {value!r}, not a positive number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"config.json: {name} is {value!r}, not true or false")
        return default if value is None else value

    def _get(self, name: str, default: float | None) -> Any:
        value = self.raw.get(name)
        if value is None and default is None:
            raise CheckpointError(f"config.json: {name} is missing")
        return default if value is None else value


def decoder_config(raw: Mapping[str, Any], **traits: Any) -> ModelConfig:
    """What all architectures state alike, plus the ``traits`` that one of them sets. Raises CheckpointError."""
    fields = Fields(raw)
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported; only silu is")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share {kv_heads} KV heads evenly")
    if raw.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is not a multiple of {heads} heads")
    head_dim = fields.integer("head_dim", hidden // heads)
    num_layers, trained = fields.integer("num_hidden_layers"), fields.integer("max_position_embeddings", 2048)
    rope = _rope_config(fields, head_dim, trained)
    return ModelConfig(
        architecture=str((raw.get("architectures") or ["?"])[0]),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        max_position=_scaled_length(rope),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        **{"windows": (None,) * num_layers, **traits},
    )


def _rope_config(fields: Fields, head_dim: int, max_position: int) -> RopeConfig:
    """RoPE as transformers 5 states it (`rope_parameters`) or as files before it did (`rope_theta`, `rope_scaling`)."""
    raw = fields.raw
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"config.json: rope_scaling is {scaling!r}, not an object")
    theta = Fields(scaling).number("rope_theta", fields.number("rope_theta", 10_000.0))
    if theta <= 1:
        raise CheckpointError(f"config.json: rope_theta is {theta:g}, not more than 1")
    rope_type = str(scaling.get("rope_type") or scaling.get("type") or "default")
    for name in _ROPE_NUMBERS:
        if scaling.get(name):
            Fields(scaling).number(name)
    # None of the architectures in the registry turns a part of a head only; transformers ignores the field for them.
    if Fields(scaling).number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError("config.json: a partial_rotary_factor other than 1 is not supported")
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim {head_dim} is odd, so its dimensions cannot turn in pairs")
    return RopeConfig(head_dim, theta, rope_type, scaling, max_position)


def _scaled_length(rope: RopeConfig) -> int:
    """The context length that a scaling extends the trained one to. Llama 3's files state the extended one already."""
    factor = float(rope.scaling.get("factor") or 1.0)
    match rope.rope_type:
        case "linear" | "dynamic":
            return int(rope.max_position * factor)
        case "yarn":
            original = rope.scaling.get("original_max_position_embeddings") or rope.max_position
            return max(rope.max_position, int(original * factor))
    return rope.max_position


def windows_by_layer(raw: Mapping[str, Any], num_layers: int, window: int | None, first: int) -> tuple[int | None, ...]:
    """Each layer's window: by `layer_types` where it is given, else ``window`` from layer ``first`` on."""
    types = raw.get("layer_types")
    if types is None:
        return tuple(window if index >= first else None for index in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        raise CheckpointError(f"config.json: layer_types does not name the type of each of the {num_layers} layers")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise CheckpointError(f"config.json: layer type {name!r} is not supported")
    return tuple(window if name == "sliding_attention" else None for name in types)
