"""Qwen3: no biases by default, and each query and key head is normalized before the rotation."""

from collections.abc import Mapping
from typing import Any

from engine.models.config import Fields, ModelConfig, decoder_config
from engine.models.qwen2 import windows


def config(raw: Mapping[str, Any]) -> ModelConfig:
    """The shape of a ``Qwen3ForCausalLM``. Raises CheckpointError."""
    bias = Fields(raw).flag("attention_bias")
    return decoder_config(raw, windows=windows(raw), qkv_bias=bias, output_bias=bias, qk_norm=True)
