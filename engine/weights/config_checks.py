"""JSON files and model configs come from strangers: checked before anything is allocated by their word."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine.errors import CheckpointError

if TYPE_CHECKING:
    from engine.weights.checkpoint import TensorSource

# The largest value each size can sensibly have: ten times and more beyond any model of today.
_SIZES: Final[Mapping[str, int]] = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "vocab_size": 1 << 24,
}
_OPTIONAL_SIZES: Final[Mapping[str, int]] = {
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "max_position_embeddings": 1 << 30,
    "sliding_window": 1 << 30,
}
_POSITIVE: Final = ("rms_norm_eps", "rope_theta")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError, naming the file, if it cannot be read or holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError, naming the file ``where``, unless what every model needs is there and can be."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: architectures is {names!r}, not a list of names")
    for key, most in (*_SIZES.items(), *_OPTIONAL_SIZES.items()):
        value = config.get(key)
        if value is None:
            if key in _OPTIONAL_SIZES:
                continue
            raise CheckpointError(
                f"{where}: there is no {key}, which the models that Octavo runs have; this is {names[0]}"
            )
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise CheckpointError(f"{where}: {key} is {value!r}, not a number from 1 to {most}")
    for key in _POSITIVE:
        value = config.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise CheckpointError(f"{where}: {key} is {value!r}, not a positive number")
    heads, shared = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if heads % shared:
        raise CheckpointError(f"{where}: {heads} attention heads cannot share {shared} key-value heads")
    if not config.get("head_dim") and config["hidden_size"] % heads:
        raise CheckpointError(f"{where}: hidden_size {config['hidden_size']} cannot be divided into {heads} heads")


def check_tensors(config: Mapping[str, Any], tensors: "TensorSource", where: str) -> None:
    """Raises CheckpointError if the embedding or the last layer contradicts the config's sizes.

    So that a model built by the config is no larger than its files, whatever the config says. Files of layers that
    look otherwise pass: it is for the models to say that they do not know the architecture.
    """
    if "model.layers.0.self_attn.q_proj.weight" not in tensors:
        return
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    last = f"model.layers.{config['num_hidden_layers'] - 1}"
    expected = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        f"{last}.mlp.down_proj.weight": (hidden, config["intermediate_size"]),
        f"{last}.self_attn.q_proj.weight": (heads * width, hidden),
        f"{last}.self_attn.k_proj.weight": ((config.get("num_key_value_heads") or heads) * width, hidden),
    }
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{where}: there is no tensor {name!r}, which the config implies")
        if tensors.shape(name) != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(tensors.shape(name))}; the config implies {list(shape)}"
            )
