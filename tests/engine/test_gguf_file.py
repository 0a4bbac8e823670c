"""A GGUF file opens as the checkpoint that Hugging Face would have of the same model."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from engine.errors import CheckpointError
from engine.weights.checkpoint import Checkpoint
from engine.weights.gguf_file import open_gguf
from tests.engine.gguf_files import (
    BOS,
    EOS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    TOKENS,
    random_tensors,
    write_gguf,
)


def opened(tmp_path: Path, **kwargs: Any) -> Checkpoint:
    return open_gguf(write_gguf(tmp_path / "tiny.gguf", **kwargs))


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: HF's rows i and i + D/2 of a head become rows 2i and 2i + 1."""
    half = weight.shape[0] // heads // 2
    moved = np.empty_like(weight)
    for head in range(heads):
        for i in range(half):
            start = head * 2 * half
            moved[start + 2 * i], moved[start + 2 * i + 1] = weight[start + i], weight[start + half + i]
    return moved


def test_the_config_says_what_config_json_would(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)
    assert checkpoint.name == "tiny"
    assert checkpoint.generation_config == {}
    assert checkpoint.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "vocab_size": len(TOKENS),
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": None,
    }


def test_qwen_has_its_own_names_biases_and_norms(tmp_path: Path) -> None:
    qwen2 = opened(tmp_path, arch="qwen2", tensors=random_tensors(bias=True))
    assert qwen2.config["architectures"] == ["Qwen2ForCausalLM"]
    assert qwen2.config["attention_bias"] is True
    assert "model.layers.1.self_attn.q_proj.bias" in qwen2.tensors
    qwen3 = opened(
        tmp_path,
        arch="qwen3",
        tensors=random_tensors(head_norms=True),
        values={"qwen3.attention.key_length": HEAD_DIM, "qwen3.attention.value_length": HEAD_DIM},
    )
    assert qwen3.config["architectures"] == ["Qwen3ForCausalLM"]
    assert qwen3.config["attention_bias"] is False
    assert qwen3.tensors.shape("model.layers.0.self_attn.k_norm.weight") == (HEAD_DIM,)


def test_a_sliding_window_makes_a_llama_file_a_mistral(tmp_path: Path) -> None:
    config = opened(tmp_path, values={"llama.attention.sliding_window": 128}).config
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 128


def test_an_output_matrix_means_untied_embeddings(tmp_path: Path) -> None:
    tensors = random_tensors() | {"output.weight": np.zeros((len(TOKENS), HIDDEN), np.float32)}
    checkpoint = opened(tmp_path, tensors=tensors)
    assert checkpoint.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in checkpoint.tensors


@pytest.mark.parametrize("bias", [False, True])
def test_llama_rows_are_put_back_in_hugging_face_order(bias: bool, tmp_path: Path) -> None:
    original = random_tensors(bias=bias)
    stored = dict(original)
    for name in original:
        if ".attn_q." in name or ".attn_k." in name:
            stored[name] = permuted(original[name], HEADS if ".attn_q." in name else KV_HEADS)
    checkpoint = opened(tmp_path, tensors=stored)
    names = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
    for name, hf in names.items():
        for part in ("weight", "bias") if bias and name != "attn_output" else ("weight",):
            tensor = checkpoint.tensors[f"model.layers.1.self_attn.{hf}.{part}"]
            assert np.array_equal(tensor.numpy(), original[f"blk.1.{name}.{part}"])


def test_qwen_rows_stay_where_they_are(tmp_path: Path) -> None:
    original = random_tensors()
    checkpoint = opened(tmp_path, arch="qwen2", tensors=original)
    tensor = checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(tensor.numpy(), original["blk.0.attn_q.weight"])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16"])
def test_quantized_rows_are_put_back_too(kind: str, tmp_path: Path) -> None:
    known = gguf.GGMLQuantizationType[kind]
    tensors = random_tensors()
    raw = gguf.quants.quantize(tensors["blk.0.attn_k.weight"], known)
    expected = gguf.quants.dequantize(raw, known)
    tensors["blk.0.attn_k.weight"] = permuted(raw, KV_HEADS)
    types = {} if kind == "F16" else {"blk.0.attn_k.weight": known}
    checkpoint = opened(tmp_path, tensors=tensors, types=types)
    tensor = checkpoint.tensors["model.layers.0.self_attn.k_proj.weight"]
    assert tensor.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert np.array_equal(tensor.float().numpy(), expected)


def test_a_tensor_goes_into_a_part_of_a_fused_parameter_in_its_dtype(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, arch="qwen2")
    name = "model.layers.0.self_attn.v_proj.weight"
    exact = checkpoint.tensors[name]
    fused = torch.full((3, *exact.shape), torch.nan, dtype=torch.bfloat16)
    checkpoint.tensors.copy_into(name, fused[1])
    assert torch.equal(fused[1], exact.bfloat16())
    assert fused[0].isnan().all()
    assert fused[2].isnan().all()
    across = torch.empty(exact.shape[::-1]).T  # not contiguous
    checkpoint.tensors.copy_into(name, across)
    assert torch.equal(across, exact)


def test_a_tensor_of_another_shape_or_name_is_refused(tmp_path: Path) -> None:
    tensors = opened(tmp_path).tensors
    with pytest.raises(CheckpointError, match="has shape"):
        tensors.copy_into("model.norm.weight", torch.empty(HIDDEN + 1))
    for use in (tensors.__getitem__, tensors.shape, lambda name: tensors.copy_into(name, torch.empty(1))):
        with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight'"):
            use("lm_head.weight")


def test_nbytes_counts_the_bytes_that_tensors_take_in_the_file(tmp_path: Path) -> None:
    tensors = random_tensors()
    assert opened(tmp_path, tensors=tensors).tensors.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_rope_scaling_is_translated(tmp_path: Path) -> None:
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert opened(tmp_path, values=linear).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 8.0,
        "llama.rope.scaling.original_context_length": 64,
        "llama.rope.scaling.yarn_beta_fast": 24.0,
    }
    expected = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 24.0}
    assert opened(tmp_path, values=yarn).config["rope_scaling"] == expected
    assert opened(tmp_path, values={"llama.rope.scaling.type": "none"}).config["rope_scaling"] is None
    old = opened(tmp_path, values={"llama.rope.scale_linear": 2.0}).config["rope_scaling"]
    assert old == {"rope_type": "linear", "factor": 2.0}


def test_llama_3_frequencies_are_handed_on_as_the_file_has_them(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    checkpoint = opened(tmp_path, tensors=random_tensors() | {"rope_freqs.weight": factors})
    assert checkpoint.config["rope_scaling"] is None
    assert np.array_equal(checkpoint.tensors["rope_freqs.weight"].numpy(), factors)


def without(*names: str) -> dict[str, np.ndarray]:
    return {name: tensor for name, tensor in random_tensors().items() if name not in names}


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"arch": "mamba"}, "architecture 'mamba' is not supported"),
    "experts": ({"values": {"llama.expert_count": 8}}, "mixtures of experts"),
    "split": ({"values": {"split.count": 3}}, "one of several parts"),
    "no layers": ({"values": {"llama.block_count": None}}, "block_count is None"),
    "zero layers": ({"values": {"llama.block_count": 0}}, "block_count is 0"),
    "many layers": ({"values": {"llama.block_count": 900}}, "no tensor 'model.layers.899"),
    "text for a number": ({"values": {"llama.embedding_length": "many"}}, "embedding_length is 'many'"),
    "heads that vary": ({"values": {"llama.attention.head_count_kv": [2, 4]}}, r"head_count_kv is \[2, 4\]"),
    "heads that cannot share": ({"values": {"llama.attention.head_count_kv": 3}}, "cannot share"),
    "negative epsilon": (
        {"values": {"llama.attention.layer_norm_rms_epsilon": -1.0}},
        "epsilon is -1.0, not a positive number",
    ),
    "wrong width": ({"values": {"llama.embedding_length": 512}}, "not as wide as"),
    "wrong heads": ({"values": {"llama.attention.key_length": 32, "llama.attention.value_length": 32}}, "rows, not"),
    "unequal heads": ({"values": {"llama.attention.value_length": 32}}, "different widths"),
    "wrong feed-forward": ({"values": {"llama.feed_forward_length": 999}}, "the config implies"),
    "rope": ({"values": {"llama.rope.scaling.type": "longrope"}}, "rope scaling 'longrope'"),
    "rope factors": ({"tensors": random_tensors() | {"rope_freqs.weight": np.ones(7, np.float32)}}, "rope_freqs"),
    "rope factor 0": (
        {"tensors": random_tensors() | {"rope_freqs.weight": np.zeros(HEAD_DIM // 2, np.float32)}},
        "not positive",
    ),
    "no embedding": ({"tensors": without("token_embd.weight")}, "token_embd.weight is missing"),
    "stranger": ({"tensors": random_tensors() | {"blk.0.ssm_a": np.ones(4, np.float32)}}, "'blk.0.ssm_a' is not one"),
    "no tokens": ({"values": {"tokenizer.ggml.tokens": None}}, "tokens is missing"),
    "tokens of numbers": ({"values": {"tokenizer.ggml.tokens": [1, 2]}}, "not a list of strings"),
    "more tokens than rows": ({"tensors": random_tensors(len(TOKENS) - 1)}, "tokens, but token_embd.weight has"),
    "tokenizer": ({"values": {"tokenizer.ggml.model": "rwkv"}}, "tokenizer model 'rwkv' is not supported"),
    "pre-tokenizer": ({"values": {"tokenizer.ggml.pre": "odd"}}, "pre-tokenizer 'odd' is not supported"),
    "merge of strangers": ({"values": {"tokenizer.ggml.merges": ["h zz"]}}, "tokenizer cannot be built"),
    "merge of three": ({"values": {"tokenizer.ggml.merges": ["h e l"]}}, "not a pair"),
    "token types": ({"values": {"tokenizer.ggml.token_type": 3}}, "tokenizer cannot be built"),
}


@pytest.mark.parametrize(("how", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_faulty_file_gives_one_line_that_says_what_is_wrong(
    how: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"^[^\n]*tiny\.gguf: [^\n]*{message}[^\n]*$"):
        opened(tmp_path, **how)


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointError, match="the file is empty"):
        open_gguf(tmp_path / "empty.gguf")
    with pytest.raises(CheckpointError, match="No such file"):
        open_gguf(tmp_path / "missing.gguf")
