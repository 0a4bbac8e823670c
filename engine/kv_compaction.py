"""Carrying out a KV policy's selections: in every layer, each KV head's survivors move together."""

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.kv_cache import KVCache, Storage
from engine.kv_policies.policy import KVPolicy, Pruner, Selector, Slots
from scheduler.batch import Compaction

OFF = 2**30
"""So many hidden slots more are those of a KV head that sees nothing any more, now or later."""


def compact(cache: KVCache, compactions: Iterable[tuple[Compaction, KVPolicy]]) -> None:
    """Let each sequence's policy select; one sequence after the other, since their targets are their own."""
    for compaction, selector in compactions:
        assert isinstance(selector, Selector), "only a selecting policy has a budget that asks for it"
        _compact(cache.storage, cache.block_size, compaction, selector)


def _compact(storage: Storage, block_size: int, compaction: Compaction, selector: Selector) -> None:
    """Slots of which a score is −inf are not kept, even where there is room: a head that keeps fewer than the others
    has its survivors in the last of the slots, so that the next tokens' are the same for all, and hides the first ones.
    """
    device, kept = storage.kv.device, compaction.num_kept
    source = _places(torch.tensor(compaction.source), compaction.num_slots, block_size, device)
    target = _places(torch.tensor(compaction.target), kept, block_size, device)
    hidden = storage.hidden[:, compaction.source[0]]
    if compaction.num_dropped == 0:
        hidden = torch.zeros_like(hidden)
    slots = Slots(
        keys=storage.kv[:, 0][:, source[0], :, source[1]].movedim(0, 2),
        values=storage.kv[:, 1][:, source[0], :, source[1]].movedim(0, 2),
        mass=storage.mass[:, source[0], :, source[1]].movedim(0, 2),
        positions=_positions(storage, source, compaction),
        output=storage.output[:, compaction.source[0]],
        off=hidden >= OFF,
    )
    chosen, gone = choose(selector.score(slots).masked_fill(slots.positions < 0, float("-inf")), kept)
    rows = chosen.unsqueeze(-1).expand(*chosen.shape, slots.keys.shape[-1])
    storage.kv[:, 0][:, target[0], :, target[1]] = slots.keys.gather(2, rows).movedim(2, 0)
    storage.kv[:, 1][:, target[0], :, target[1]] = slots.values.gather(2, rows).movedim(2, 0)
    storage.mass[:, target[0], :, target[1]] = slots.mass.gather(2, chosen).movedim(2, 0)
    positions = slots.positions.gather(2, chosen).masked_fill(gone, -1)
    storage.positions[:, target[0], :, target[1]] = positions.movedim(2, 0)
    storage.output[:, compaction.target[0]] = slots.output
    off = selector.heads_off(slots) if isinstance(selector, Pruner) else slots.off
    storage.hidden[:, compaction.target[0]] = gone.sum(-1, dtype=torch.int32) + OFF * off


def choose(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` slots of the highest scores [L, Hkv, n], and which of them are none: both [L, Hkv, count].

    The slots of −inf come first, the others in order of place; of equal scores the later ones are chosen.
    """
    num_slots = scores.shape[-1]
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :count]
    chosen = num_slots - 1 - order
    gone = scores.gather(-1, chosen).isneginf()
    chosen = (chosen - num_slots * gone).sort(dim=-1).values
    return chosen % num_slots, chosen < 0


def _positions(storage: Storage, source: tuple[Tensor, Tensor], compaction: Compaction) -> Tensor:
    """Of the tokens in the slots, [L, Hkv, n]: those selected before know theirs, the others follow from their slots.

    −1 where there is none."""
    layers, _, heads = storage.hidden.shape
    number = torch.arange(compaction.num_slots, dtype=torch.int32, device=storage.hidden.device)
    positions = (number + compaction.num_dropped).repeat(layers, heads, 1)
    if compaction.num_dropped:
        blocks, offsets = source[0][: compaction.num_kept], source[1][: compaction.num_kept]
        positions[..., : compaction.num_kept] = storage.positions[:, blocks, :, offsets].movedim(0, 2)
    return positions


def _places(table: Tensor, num_slots: int, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Block and offset of each of a table's first slots."""
    slots = torch.arange(num_slots)
    return table[slots // block_size].to(device, torch.int64), (slots % block_size).to(device)
