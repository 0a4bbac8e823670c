"""Blocks move between the tiers and on the device, in an order that loses nothing."""

import torch

from engine.kv_cache import KVCache
from engine.launch import LoadedModel
from scheduler.batch import Transfers


def _cache(tiny: LoadedModel) -> KVCache:
    """Six blocks, whose values all are their number in the first layer's keys, and differ by 100 from part to part."""
    cache = KVCache(
        tiny.decoder.config,
        num_blocks=6,
        block_size=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_host_blocks=4,
    )
    for number, part in enumerate(part for layer in cache.layers for part in (layer.key, layer.value)):
        part[:] = torch.arange(6.0).view(6, 1, 1, 1) + 100 * number
    return cache


def _blocks(cache: KVCache) -> list[int]:
    """Each block's number, after a look at every value of it in every layer."""
    for number, part in enumerate(part for layer in cache.layers for part in (layer.key, layer.value)):
        assert torch.equal(part, cache.layers[0].key[:, :1, :1, :1].expand_as(part) + 100 * number)
    return [int(value) for value in cache.layers[0].key[:, 0, 0, 0]]


def test_what_moves_to_the_host_comes_back_as_it_was(tiny: LoadedModel) -> None:
    cache = _cache(tiny)
    cache.transfer(Transfers(out=((1, 3), (2, 0))))
    assert _blocks(cache) == [0, 1, 2, 3, 4, 5]
    cache.transfer(Transfers(back=((3, 5), (0, 1))))
    assert _blocks(cache) == [0, 2, 2, 3, 4, 1]


def test_blocks_are_copied_as_they_were_before_any_was_written(tiny: LoadedModel) -> None:
    cache = _cache(tiny)
    cache.transfer(Transfers(copies=((1, 2), (2, 3), (3, 1))))
    assert _blocks(cache) == [0, 3, 1, 2, 4, 5]


def test_what_a_block_held_is_saved_and_copied_before_the_block_is_written(tiny: LoadedModel) -> None:
    cache = _cache(tiny)
    cache.transfer(Transfers(out=((5, 2),)))
    cache.transfer(Transfers(out=((1, 0), (2, 1)), copies=((3, 1), (4, 0)), back=((0, 2), (2, 3), (1, 4))))
    assert _blocks(cache) == [4, 3, 1, 5, 2, 5]


def test_nothing_to_move_moves_nothing(tiny: LoadedModel) -> None:
    cache = _cache(tiny)
    cache.transfer(Transfers())
    assert _blocks(cache) == [0, 1, 2, 3, 4, 5]
