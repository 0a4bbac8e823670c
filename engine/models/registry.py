"""Which architectures Octavo runs: the name in a config.json → how to read the rest of it."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from engine.errors import CheckpointError
from engine.models import llama, mistral, qwen2, qwen3
from engine.models.config import ModelConfig

ARCHITECTURES: Final[Mapping[str, Callable[[Mapping[str, Any]], ModelConfig]]] = {
    "LlamaForCausalLM": llama.config,
    "MistralForCausalLM": mistral.config,
    "Qwen2ForCausalLM": qwen2.config,
    "Qwen3ForCausalLM": qwen3.config,
}


def model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read the contents of a config.json. Raises CheckpointError for an unknown architecture or an unusable field."""
    named = raw.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if not names:
        raise CheckpointError("config.json: it names no architecture")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name](raw)
    known = ", ".join(sorted(ARCHITECTURES))
    raise CheckpointError(f"config.json: architecture {', '.join(names)} is not supported; these are: {known}")
