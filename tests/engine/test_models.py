"""Every architecture's logits equal transformers', under every RoPE scaling, however the prompt is chunked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.launch import load_model
from engine.models.registry import model_config
from tests.engine.checkpoints import SHAPE, random_model, save
from tests.engine.driving import all_logits

_ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
        "truncate": False,
        "beta_fast": 16,
    },
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3-biased": ("qwen3", {"attention_bias": True}),
}


def _relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.inference_mode()
def _check(model: Any, folder: Path, length: int = 90, chunks: tuple[int, ...] = (40, 1, 1, 48)) -> None:
    tokens = torch.randint(3, SHAPE["vocab_size"], (length,), generator=torch.Generator().manual_seed(3))
    expected = model(tokens[None]).logits[0]
    loaded = load_model(EngineConfig(model=str(folder), dtype="float32"))
    for sizes in [(length,), chunks]:
        assert _relative_error(all_logits(loaded, tokens.tolist(), sizes), expected) < 1e-5


@pytest.mark.parametrize("name", _MODELS)
def test_an_architecture_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    model_type, settings = _MODELS[name]
    model = random_model(model_type, **settings)
    _check(model, save(model, tmp_path))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("rope", _ROPES)
def test_a_rope_scaling_computes_what_transformers_computes(model_type: str, rope: str, tmp_path: Path) -> None:
    model = random_model(model_type, rope_parameters=_ROPES[rope])
    _check(model, save(model, tmp_path))


def test_the_older_spelling_of_rope_scaling_means_the_same(tmp_path: Path) -> None:
    model = random_model("llama", rope_parameters=_ROPES["llama3"])
    scaling = {key: value for key, value in _ROPES["llama3"].items() if key not in ("rope_theta", "rope_type")}
    older = {"rope_parameters": None, "rope_theta": 500_000.0, "rope_scaling": {"type": "llama3", **scaling}}
    _check(model, save(model, tmp_path, **older))


@torch.inference_mode()
def test_dynamic_rope_beyond_the_trained_length_turns_each_token_as_transformers_decodes_it(tmp_path: Path) -> None:
    model = random_model("llama", rope_parameters=_ROPES["dynamic"], max_position_embeddings=32)
    tokens = torch.randint(3, SHAPE["vocab_size"], (60,), generator=torch.Generator().manual_seed(3))
    cache = DynamicCache()  # passed by place: its parameter's name differs between releases of transformers
    expected = [model(token.view(1, 1), None, None, cache, use_cache=True).logits[0] for token in tokens]
    loaded = load_model(EngineConfig(model=str(save(model, tmp_path)), dtype="float32"))
    for sizes in [(60,), (20, 1, 39)]:
        assert _relative_error(all_logits(loaded, tokens.tolist(), sizes), torch.cat(expected)) < 1e-5


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    folder = save(random_model("llama"), tmp_path)
    tokens = list(range(3, 60))
    exact, rounded = (
        all_logits(load_model(EngineConfig(model=str(folder), dtype=dtype)), tokens, (57,)).float()  # type: ignore[arg-type]
        for dtype in ("float32", "bfloat16")
    )
    assert 1e-4 < _relative_error(rounded, exact) < 0.1


_CONFIG: dict[str, Any] = {**SHAPE, "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported; these are: Llama"),
        ({"architectures": None}, "names no architecture"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "48"}, "hidden_size is '48', not a positive whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776"),
        ({"num_key_value_heads": 4}, "6 attention heads cannot share 4 KV heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "much"}}, "factor is 'much', not a positive number"),
        ({"rope_scaling": 3}, "rope_scaling is 3, not an object"),
    ],
)
def test_an_unusable_config_is_one_clear_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        model_config({**_CONFIG, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "longrope"}, "'longrope' is not supported"),
        ({"rope_type": "linear"}, "lacks 'factor'"),
        ({"rope_type": "dynamic"}, "lacks 'factor'"),
        ({"rope_type": "llama3", "factor": None}, "cannot be computed"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": "a", "mscale_all_dim": 1.0}, "mscale is 'a'"),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}, "rope_theta is 1, not more than 1"),
    ],
)
def test_an_unusable_rope_scaling_is_one_clear_line(scaling: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save(random_model("llama"), tmp_path, rope_parameters=None, rope_scaling=scaling)
    with pytest.raises(CheckpointError, match=message):
        load_model(EngineConfig(model=str(folder)))


def test_a_tensor_of_the_wrong_shape_is_one_clear_line(tmp_path: Path) -> None:
    folder = save(random_model("llama"), tmp_path, intermediate_size=80)
    with pytest.raises(CheckpointError, match=r"mlp.*has shape"):
        load_model(EngineConfig(model=str(folder)))
