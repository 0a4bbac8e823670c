"""Carrying out a KV policy's selections: in every layer, each KV head's survivors move together."""

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.kv_cache import KVCache, LayerCache
from engine.kv_policies.policy import KVPolicy, Selector, Slots
from scheduler.batch import Compaction


def compact(cache: KVCache, compactions: Iterable[tuple[Compaction, KVPolicy]]) -> None:
    """Let each sequence's policy select; one sequence after the other, since their targets are their own."""
    for compaction, selector in compactions:
        assert isinstance(selector, Selector), "only a selecting policy has a budget that asks for it"
        device = cache.layers[0].key.device
        source = _places(torch.tensor(compaction.source), compaction.num_slots, cache.block_size, device)
        target = _places(torch.tensor(compaction.target), compaction.num_kept, cache.block_size, device)
        for layer in cache.layers:
            _compact_layer(layer, source, target, selector)


def _compact_layer(
    layer: LayerCache, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], selector: Selector
) -> None:
    blocks, offsets = source
    slots = Slots(
        key_rows=layer.key[blocks, :, offsets].transpose(0, 1),
        value_rows=layer.value[blocks, :, offsets].transpose(0, 1),
        mass=layer.mass[blocks, :, offsets].T,
        kv_format=layer.kv_format,
    )
    kept = kept_slots(selector.score(slots), len(target[0]))
    blocks, offsets = target
    rows = kept.unsqueeze(-1).expand(-1, -1, layer.key.shape[-1])
    layer.key[blocks, :, offsets] = slots.key_rows.gather(1, rows).transpose(0, 1)
    layer.value[blocks, :, offsets] = slots.value_rows.gather(1, rows).transpose(0, 1)
    layer.mass[blocks, :, offsets] = slots.mass.gather(1, kept).T


def kept_slots(scores: Tensor, count: int) -> Tensor:
    """The slots of the highest scores [Hkv, L] in order of place, [Hkv, count]; of equal scores the later ones."""
    order = scores.flip(1).argsort(dim=1, descending=True, stable=True)[:, :count]
    return (scores.shape[1] - 1 - order).sort(dim=1).values


def _places(table: Tensor, num_slots: int, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Block and offset of each of a table's first slots."""
    slots = torch.arange(num_slots)
    return table[slots // block_size].to(device, torch.int64), (slots % block_size).to(device)
