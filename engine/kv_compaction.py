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
        _compact(cache, compaction, selector)


def _compact(cache: KVCache, compaction: Compaction, selector: Selector) -> None:
    """Slots of which a score is −inf are not kept, even where there is room: a head that keeps fewer than the others
    has its survivors in the last of the slots, so that the next tokens' are the same for all, and hides the first ones.
    """
    storage = cache.storage
    source = storage.places(compaction.source, compaction.num_slots)
    target = storage.places(compaction.target, compaction.num_kept)
    hidden = storage.hidden[:, compaction.source[0]]
    if compaction.num_dropped == 0:
        hidden = torch.zeros_like(hidden)
    slots = Slots(
        kv=lambda which: cache.decoded(storage.rows()[storage.of_kv(source, which)]),
        mass=storage.mass.view(-1)[source],
        positions=_positions(storage, source, compaction),
        output=storage.output[:, compaction.source[0]],
        off=hidden >= OFF,
    )
    chosen, gone = choose(selector.score(slots).masked_fill(slots.positions < 0, float("-inf")), compaction.num_kept)
    origin = source.gather(2, chosen)
    for which in (0, 1):
        moved = storage.rows().index_select(0, storage.of_kv(origin, which).flatten())
        storage.rows().index_copy_(0, storage.of_kv(target, which).flatten(), moved)
    storage.mass.view(-1)[target] = slots.mass.gather(2, chosen)
    storage.positions.view(-1)[target] = slots.positions.gather(2, chosen).masked_fill(gone, -1)
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


def _positions(storage: Storage, source: Tensor, compaction: Compaction) -> Tensor:
    """Of the tokens in the slots, [L, Hkv, n]: those selected before know theirs, the others follow from their slots.

    −1 where there is none."""
    number = torch.arange(compaction.num_slots, dtype=torch.int32, device=source.device)
    positions = (number + compaction.num_dropped).repeat(*source.shape[:2], 1)
    if compaction.num_dropped:
        selected = source[..., : compaction.num_kept]
        positions[..., : compaction.num_kept] = storage.positions.view(-1)[selected]
    return positions
