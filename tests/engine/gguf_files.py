"""Tiny GGUF files for tests, written by the `gguf` package: an independent hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS = 256, 512, 4, 2, 2
HEAD_DIM = HIDDEN // HEADS

# A byte-level vocabulary: the 256 bytes in GPT-2's spelling, a few merges, two control tokens and one user-defined.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [chr(b) for b in _PRINTABLE] + [chr(256 + i) for i in range(256 - len(_PRINTABLE))]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ 1", "Ġ Ġ"]
TOKENS = [*BYTES, *(merge.replace(" ", "") for merge in MERGES), "<s>", "</s>", "<think>"]
KINDS = [1] * (len(TOKENS) - 3) + [3, 3, 4]
BOS, EOS = TOKENS.index("<s>"), TOKENS.index("</s>")


def random_tensors(vocab: int = len(TOKENS), *, bias: bool = False, head_norms: bool = False) -> dict[str, np.ndarray]:
    """Float32 tensors of a two-layer model, under GGUF's names."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        projections = {
            "attn_q": (HEADS * HEAD_DIM, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_gate": (INTERMEDIATE, HIDDEN),
            "ffn_up": (INTERMEDIATE, HIDDEN),
            "ffn_down": (HIDDEN, INTERMEDIATE),
        }
        norms = {"attn_norm": HIDDEN, "ffn_norm": HIDDEN}
        if head_norms:
            norms |= {"attn_q_norm": HEAD_DIM, "attn_k_norm": HEAD_DIM}
        for name, shape in projections.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
            if bias and name in ("attn_q", "attn_k", "attn_v"):
                shapes[f"blk.{layer}.{name}.bias"] = shape[:1]
        for name, size in norms.items():
            shapes[f"blk.{layer}.{name}.weight"] = (size,)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def model_values(arch: str) -> dict[str, Any]:
    """The metadata of that model's sizes."""
    sizes = {
        "context_length": 512,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE,
        "block_count": LAYERS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50000.0,
    }
    return {f"{arch}.{key}": value for key, value in sizes.items()}


def tokenizer_values(pre: str = "gpt-2") -> dict[str, Any]:
    """The metadata of the byte-level vocabulary above."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
    }


def write_gguf(
    path: Path,
    *,
    arch: str = "llama",
    values: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Writes a whole model; ``values`` are added to its metadata, None taking a key away.

    ``types`` names the tensors that are given as raw quantized bytes.
    """
    writer = gguf.GGUFWriter(path, arch)
    merged = model_values(arch) | tokenizer_values() | dict(values or {})
    for key, value in merged.items():
        if value is not None:
            _add(writer, key, value)
    for name, tensor in (random_tensors() if tensors is None else tensors).items():
        writer.add_tensor(name, tensor, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
