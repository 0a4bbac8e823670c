"""Mistral: Llama's form, every layer with a sliding window where the config sets one (Jiang et al. 2023, §2)."""

from collections.abc import Mapping
from typing import Any

from engine.models.config import Fields, ModelConfig, decoder_config, windows_by_layer


def config(raw: Mapping[str, Any]) -> ModelConfig:
    """The shape of a ``MistralForCausalLM``. Raises CheckpointError."""
    fields = Fields(raw)
    window = None if raw.get("sliding_window") is None else fields.integer("sliding_window")
    windows = windows_by_layer(raw, fields.integer("num_hidden_layers"), window, first=0)
    return decoder_config(raw, windows=windows)
