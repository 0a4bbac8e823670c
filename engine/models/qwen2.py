"""Qwen2 and Qwen2.5: biases on query, key and value; optionally a sliding window in the upper layers."""

from collections.abc import Mapping
from typing import Any

from engine.models.config import Fields, ModelConfig, decoder_config, windows_by_layer


def windows(raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's window; Qwen3 states it in the same way."""
    fields = Fields(raw)
    window = fields.integer("sliding_window", 4096) if fields.flag("use_sliding_window") else None
    num_layers = fields.integer("num_hidden_layers")
    first = fields.integer("max_window_layers", 28) if raw.get("max_window_layers") != 0 else 0
    return windows_by_layer(raw, num_layers, window, first)


def config(raw: Mapping[str, Any]) -> ModelConfig:
    """The shape of a ``Qwen2ForCausalLM``. Raises CheckpointError."""
    return decoder_config(raw, windows=windows(raw), qkv_bias=True)
