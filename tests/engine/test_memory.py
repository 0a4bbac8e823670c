"""The KV cache and the context length are fitted to each other, or refused in one line."""

from typing import Any

import pytest
import torch

from engine import memory
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv_cache import KVCache
from engine.models.config import ModelConfig
from engine.models.registry import model_config
from tests.engine.checkpoints import SHAPE

_CPU = torch.device("cpu")


def _model(**change: Any) -> ModelConfig:
    return model_config({**SHAPE, "architectures": ["LlamaForCausalLM"], **change})


_BLOCK = KVCache.block_bytes(_model(), 16, torch.float32)


def _plan(model: ModelConfig | None = None, **config: Any) -> memory.MemoryPlan:
    return memory.plan_memory(EngineConfig(**config), model or _model(), torch.float32, _CPU)


def test_a_block_holds_keys_and_values_of_all_layers() -> None:
    assert _BLOCK == 2 * 3 * 2 * 16 * 16 * 4
    cache = KVCache(_model(), num_blocks=5, block_size=16, dtype=torch.float32, device=_CPU)
    assert sum(layer.key.nbytes + layer.value.nbytes for layer in cache.layers) == 5 * _BLOCK


def test_an_explicit_size_is_used_to_the_last_block() -> None:
    assert _plan(kv_cache_memory=1000 * _BLOCK + 1) == memory.MemoryPlan(1000, 0, 256)


def test_the_same_size_holds_as_many_more_blocks_as_rows_are_smaller() -> None:
    """16 dimensions take 64 bytes in float32, 8 in 4 bits, and 4 more for a scale and a least value."""
    plan = _plan(kv_cache_memory=300 * _BLOCK, kv_cache_dtype="int4")
    assert plan.num_blocks == 300 * 64 // 12
    cache = KVCache(_model(), num_blocks=5, block_size=16, dtype=torch.float32, device=_CPU, kv_format=plan.kv_format)
    assert sum(layer.key.nbytes + layer.value.nbytes for layer in cache.layers) == 5 * _BLOCK * 12 // 64


def test_without_a_size_it_is_what_running_sequences_and_as_many_cached_prefixes_can_use() -> None:
    assert _plan(max_num_seqs=2) == memory.MemoryPlan(2 * 2 * 16, 0, 256)


def test_without_a_size_it_is_at_most_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 40 * _BLOCK)
    assert _plan() == memory.MemoryPlan(10, 0, 160)


def test_a_small_cache_shortens_the_context_unless_it_was_asked_for() -> None:
    assert _plan(kv_cache_memory=4 * _BLOCK).max_model_len == 64
    with pytest.raises(ConfigError, match=r"room for 64 tokens, too few for --max-model-len 65.*at least 60KiB"):
        _plan(kv_cache_memory=4 * _BLOCK, max_model_len=65)


def _mistral(window: int | None) -> ModelConfig:
    return model_config({**SHAPE, "architectures": ["MistralForCausalLM"], "sliding_window": window})


def test_where_all_layers_have_windows_the_context_may_be_longer_than_the_cache() -> None:
    """A window of 40 and a step of 16 tokens take up to 5 blocks of 16, whatever the length."""
    small = {"max_num_batched_tokens": 16, "kv_cache_memory": 5 * _BLOCK}
    assert _plan(_mistral(40), **small).max_model_len == 256
    assert _plan(_mistral(40), **small, max_model_len=256).max_model_len == 256
    assert _plan(_mistral(None), **small).max_model_len == 80
    assert _plan(_mistral(40), **{**small, "kv_cache_memory": 4 * _BLOCK}).max_model_len == 64
    with pytest.raises(ConfigError, match=r"room for 64 tokens, too few for --max-model-len 256.*at least 60KiB"):
        _plan(_mistral(40), **{**small, "kv_cache_memory": 4 * _BLOCK}, max_model_len=256)


def test_the_host_tier_is_as_large_as_was_asked_for_and_swapping_needs_one() -> None:
    assert _plan(swap_memory=7 * _BLOCK + 5).num_host_blocks == 7
    with pytest.raises(ConfigError, match="--preemption swap needs --swap-memory"):
        _plan(preemption="swap")
    with pytest.raises(ConfigError, match=r"no room for one block: it must be at least 12KiB"):
        _plan(swap_memory=_BLOCK - 1)


def test_a_cache_of_less_than_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"room for 0 tokens, too few for one block.*at least 12KiB"):
        _plan(kv_cache_memory=_BLOCK - 1)


def test_more_than_the_trained_length_is_refused_unless_a_scaling_extends_it() -> None:
    with pytest.raises(ConfigError, match="--max-model-len 257 is more than the 256 tokens"):
        _plan(max_model_len=257)
    for scaling, length in [
        ({"rope_type": "linear", "factor": 2.0}, 512),
        ({"rope_type": "dynamic", "factor": 2.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "llama3", "factor": 8.0}, 256),
    ]:
        assert _plan(_model(rope_scaling=scaling)).max_model_len == length
