"""From GGUF's metadata to the config.json and the tensor names that Hugging Face would have for the same model."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.errors import CheckpointError
from engine.weights.gguf_header import GGUFHeader

# What each GGUF architecture is called in an HF config. llama.cpp files Llama, Mistral and SmolLM all under "llama".
_ARCHITECTURES: Final[Mapping[str, tuple[str, str]]] = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}

_GLOBAL_NAMES: Final[Mapping[str, str]] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_TENSOR: Final = re.compile(r"blk\.(\d{1,4})\.([a-z_]+)\.(weight|bias)")
# Divisors of the rotary frequencies, by which files state Llama 3's scaling. HF's config says it in parameters and
# has no such tensor, so it keeps its name; `rope_scaling` is then None.
ROPE_FACTORS: Final = "rope_freqs.weight"


@dataclass(frozen=True)
class _Metadata:
    """Typed look-ups in the metadata; a missing or mistyped key is a CheckpointError that names it."""

    values: Mapping[str, Any]
    prefix: str
    where: str

    def integer(self, key: str, default: int | None = None, *, most: int = 1 << 24) -> int:
        value = self.values.get(f"{self.prefix}.{key}", default)
        # Some models have a value per layer; those whose layers differ are other architectures.
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise CheckpointError(
                f"{self.where}: metadata {self.prefix}.{key} is {value!r}, not a number from 1 to {most}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(f"{self.prefix}.{key}", default)
        if not isinstance(value, float | int) or not math.isfinite(value) or value <= 0:
            raise CheckpointError(f"{self.where}: metadata {self.prefix}.{key} is {value!r}, not a positive number")
        return float(value)

    def has(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.values


def _single(value: float) -> float:
    """A float32 as a short decimal: 1e-05, as config.json would say, not 9.99999974e-06."""
    return float(f"{value:.7g}")


def config_of(header: GGUFHeader, where: str) -> dict[str, Any]:
    """The HF config of a GGUF file. ``where`` names the file in errors.

    Raises CheckpointError on an architecture that we do not run, and on values that are missing or cannot be.
    """
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise CheckpointError(f"{where}: architecture {architecture!r} is not supported; known are {known}")
    meta = _Metadata(header.metadata, architecture, where)
    if header.metadata.get(f"{architecture}.expert_count"):
        raise CheckpointError(f"{where}: mixtures of experts are not supported")
    name, model_type = _ARCHITECTURES[architecture]
    config: dict[str, Any] = {"architectures": [name], "model_type": model_type, "hidden_act": "silu"}
    config |= _sizes(meta, header)
    config |= {
        "rms_norm_eps": _single(meta.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _single(meta.number("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "rope_scaling": _rope_scaling(meta),
    }
    if architecture == "llama" and meta.has("attention.sliding_window"):
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        config["sliding_window"] = meta.integer("attention.sliding_window")
    for key, token in (
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
        ("pad_token_id", "padding_token_id"),
    ):
        index = header.metadata.get(f"tokenizer.ggml.{token}")
        config[key] = index if isinstance(index, int) else None
    return config


def _sizes(meta: _Metadata, header: GGUFHeader) -> dict[str, Any]:
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count", most=4096)
    rotated = meta.integer("rope.dimension_count", max(1, hidden // heads), most=4096)
    head_dim = meta.integer("attention.key_length", rotated if meta.prefix == "llama" else hidden // heads, most=4096)
    if meta.integer("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{meta.where}: keys and values of different widths are not supported")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        raise CheckpointError(
            f"{meta.where}: token_embd.weight is missing, or not as wide as embedding_length {hidden}"
        )
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count", most=1024),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads, most=4096),
        "head_dim": head_dim,
        "max_position_embeddings": meta.integer("context_length", most=1 << 30),
        "vocab_size": embedding.shape[0],
    }
    if heads % sizes["num_key_value_heads"]:
        raise CheckpointError(
            f"{meta.where}: {heads} heads cannot share {sizes['num_key_value_heads']} key-value heads"
        )
    if rotated < head_dim:
        sizes["partial_rotary_factor"] = rotated / head_dim
    return sizes


def _rope_scaling(meta: _Metadata) -> dict[str, Any] | None:
    kind = meta.values.get(f"{meta.prefix}.rope.scaling.type", "none")
    if meta.has("rope.scale_linear"):  # files of 2023
        factor = meta.number("rope.scale_linear")
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{meta.where}: rope scaling {kind!r} is not supported; known are linear and yarn")
    factor = meta.number("rope.scaling.factor")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "linear":
        return scaling
    if meta.has("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = meta.integer("rope.scaling.original_context_length", most=1 << 30)
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if meta.has(f"rope.scaling.{theirs}"):
            scaling[ours] = meta.number(f"rope.scaling.{theirs}")
    for key in ("rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor"):
        if meta.has(key):
            # llama.cpp multiplies YaRN's temperature by it; HF's attention_factor replaces that temperature.
            scaling["attention_factor"] = meta.number(key) * (0.1 * math.log(factor) + 1)
    return scaling


def hf_name(name: str) -> str | None:
    """The HF name of a GGUF tensor; None if Llama and Qwen have no such tensor."""
    if name == ROPE_FACTORS:
        return name
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match = _BLOCK_TENSOR.fullmatch(name)
    if match is None or match[2] not in _BLOCK_NAMES:
        return None
    return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"
