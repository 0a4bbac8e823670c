"""Llama 2, 3 and all that share their form (SmolLM, TinyLlama, …): biases only where the config asks for them."""

from collections.abc import Mapping
from typing import Any

from engine.models.config import Fields, ModelConfig, decoder_config


def config(raw: Mapping[str, Any]) -> ModelConfig:
    """The shape of a ``LlamaForCausalLM``. Raises CheckpointError."""
    fields = Fields(raw)
    bias = fields.flag("attention_bias")
    return decoder_config(raw, qkv_bias=bias, output_bias=bias, mlp_bias=fields.flag("mlp_bias"))
