"""Estimates from data sheets, checked against published sizes and arithmetic by hand."""

from typing import Any

import pytest

from scheduler.cost_model import Work
from scheduler.hardware import DEVICES, MODELS, Device, Efficiency, ModelShape, estimate, kv_tokens

_PUBLISHED = {
    "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b": 70.6e9,
    "llama-3.2-1b": 1.24e9,
    "llama-3.2-3b": 3.21e9,
    "mistral-7b": 7.25e9,
    "qwen2.5-7b": 7.62e9,
    "qwen3-8b": 8.19e9,
    "smollm2-135m": 135e6,
}
"""Parameters, as the model cards state them."""

_TINY = ModelShape(layers=2, hidden=8, intermediate=16, heads=4, kv_heads=2, head_dim=2, vocabulary=10)
_CONFIG: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_as_many_weights_as_its_card_says(name: str) -> None:
    assert MODELS[name].weights == pytest.approx(_PUBLISHED[name], rel=5e-3)


def test_the_weights_and_the_kv_of_a_tiny_model_by_hand() -> None:
    attention = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8  # queries, keys, values, output
    assert _TINY.layer_weights == 2 * (attention + 3 * 8 * 16)
    assert (_TINY.output_weights, _TINY.weights) == (80, _TINY.layer_weights + 160)
    assert _TINY.kv_bytes == 2 * 2 * 2 * 2 * 2  # keys and values, layers, heads, dimensions, bytes


def test_a_shape_is_read_from_a_config_json() -> None:
    assert ModelShape.from_config(_CONFIG) == _TINY
    other = ModelShape.from_config({**_CONFIG, "head_dim": 6, "num_key_value_heads": None, "tie_word_embeddings": True})
    assert (other.head_dim, other.kv_heads, other.weights) == (6, 4, other.layer_weights + 80)
    with pytest.raises(ValueError, match="vocab_size is None, not a positive whole number"):
        ModelShape.from_config({**_CONFIG, "vocab_size": None})


def test_a_step_takes_what_reading_the_weights_takes_or_what_multiplying_by_them_takes() -> None:
    device = Device(flops=1e6, bandwidth=1e4, memory=1e5, link=1e3)
    cost = estimate(device, _TINY, Efficiency(flops=0.5, bandwidth=0.5, overhead=1.0))
    reading, multiplying = 2 * (_TINY.layer_weights + 80) / 5e3, 2 * _TINY.layer_weights / 5e5
    assert cost.seconds(Work(1, 0, 0, 0)) == pytest.approx(1 + reading)
    assert cost.seconds(Work(1000, 0, 0, 0)) == pytest.approx(1 + 1000 * multiplying)
    assert cost.per_sample == pytest.approx(2 * 80 / 5e5)
    assert cost.per_context_token == pytest.approx(_TINY.kv_bytes / 5e3)
    assert cost.per_pair == pytest.approx(4 * 2 * 4 * 2 / 5e5)
    assert cost.per_moved_token == pytest.approx(_TINY.kv_bytes / 500)


def test_the_kv_cache_gets_what_the_weights_leave() -> None:
    device = Device(flops=1.0, bandwidth=1.0, memory=10_000, link=1.0)
    assert kv_tokens(device, _TINY) == int((9000 - 2 * _TINY.weights) // 32)
    assert kv_tokens(DEVICES["h100"], MODELS["llama-3.1-70b"]) < 0
