"""Blocks move between the tiers and on the device, in an order that loses nothing; what they hold, in every format."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kv_cache import KVCache, pick_kv_format
from engine.launch import LoadedModel
from engine.models.registry import model_config
from kernels import ops
from kernels.kv_format import FORMATS
from scheduler.batch import Transfers
from tests.engine.checkpoints import SHAPE
from tests.engine.driving import all_logits


@pytest.fixture(params=[None, "int4"])
def cache(tiny: LoadedModel, request: pytest.FixtureRequest) -> KVCache:
    """Six blocks, whose values all are their number in the first layer's keys, and differ by 10 from part to part."""
    cache = KVCache(
        tiny.decoder.config,
        num_blocks=6,
        block_size=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_host_blocks=4,
        kv_format=request.param and FORMATS[request.param],
    )
    for number, part in enumerate(part for layer in cache.layers for part in (layer.key, layer.value)):
        part[:] = torch.arange(6).view(6, 1, 1, 1) + 10 * number
    return cache


def _blocks(cache: KVCache) -> list[int]:
    """Each block's number, after a look at every value of it in every layer."""
    for number, part in enumerate(part for layer in cache.layers for part in (layer.key, layer.value)):
        assert torch.equal(part, cache.layers[0].key[:, :1, :1, :1].expand_as(part) + 10 * number)
    return [int(value) for value in cache.layers[0].key[:, 0, 0, 0]]


def test_what_moves_to_the_host_comes_back_as_it_was(cache: KVCache) -> None:
    cache.transfer(Transfers(out=((1, 3), (2, 0))))
    assert _blocks(cache) == [0, 1, 2, 3, 4, 5]
    cache.transfer(Transfers(back=((3, 5), (0, 1))))
    assert _blocks(cache) == [0, 2, 2, 3, 4, 1]


def test_blocks_are_copied_as_they_were_before_any_was_written(cache: KVCache) -> None:
    cache.transfer(Transfers(copies=((1, 2), (2, 3), (3, 1))))
    assert _blocks(cache) == [0, 3, 1, 2, 4, 5]


def test_what_a_block_held_is_saved_and_copied_before_the_block_is_written(cache: KVCache) -> None:
    cache.transfer(Transfers(out=((5, 2),)))
    cache.transfer(Transfers(out=((1, 0), (2, 1)), copies=((3, 1), (4, 0)), back=((0, 2), (2, 3), (1, 4))))
    assert _blocks(cache) == [4, 3, 1, 5, 2, 5]


def test_nothing_to_move_moves_nothing(cache: KVCache) -> None:
    cache.transfer(Transfers())
    assert _blocks(cache) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_over_a_plain_cache_that_holds_what_rows_decode_to(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tokens, kv_format, write = [*range(3, 40)], FORMATS[name], ops.kv_write
    actual = all_logits(tiny, tokens, [1, 20, 16], block_size=4, kv_format=kv_format)

    def write_decoded(k: Tensor, v: Tensor, *caches: Any) -> None:
        write(kv_format.decode(kv_format.encode(k)), kv_format.decode(kv_format.encode(v)), *caches)

    monkeypatch.setattr(ops, "kv_write", write_decoded)
    torch.testing.assert_close(actual, all_logits(tiny, tokens, [1, 20, 16], block_size=4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_format_is_none_where_the_model_s_dtype_is_meant(dtype: torch.dtype) -> None:
    config = model_config({**SHAPE, "architectures": ["LlamaForCausalLM"]})
    none = [name for name in ("auto", *FORMATS) if pick_kv_format(name, config, dtype) is None]
    assert none == [
        "auto",
        *(name for name, own in [("bf16", torch.bfloat16), ("fp16", torch.float16)] if own is dtype),
    ]


def test_int4_for_an_odd_head_dimension_is_refused_in_words() -> None:
    config = replace(model_config({**SHAPE, "architectures": ["LlamaForCausalLM"]}), head_dim=17)
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype int4: .*even head dimension, not 17"):
        pick_kv_format("int4", config, torch.float32)
