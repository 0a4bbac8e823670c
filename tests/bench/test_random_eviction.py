"""Random eviction is random: every older token is as likely to go, and each head draws for itself."""

import torch

from bench.policy_list import candidates
from bench.random_eviction import RandomEviction
from engine.kv_compaction import choose
from engine.kv_policies.policy import Slots


def kept(policy: RandomEviction, newest: int, layers: int = 4, heads: int = 2) -> torch.Tensor:
    """The positions that stay of the last 40, [layers, heads, slots]."""
    positions = torch.arange(newest - 39, newest + 1, dtype=torch.int32).repeat(layers, heads, 1)
    nothing = torch.empty(0)
    slots = Slots(
        kv=lambda which: nothing, mass=nothing, positions=positions, output=nothing, off=torch.empty(layers, heads)
    )
    chosen, _ = choose(policy.score(slots), policy.keep + policy.recent)
    return positions.gather(2, chosen)


def test_the_newest_tokens_stay_and_any_of_the_others_may_go() -> None:
    policy = RandomEviction(keep=20, recent=10)
    counts = torch.zeros(40)
    for newest in range(39, 339):
        places = kept(policy, newest) - newest + 39
        counts += torch.bincount(places.flatten(), minlength=40)
    shares = counts / (300 * 8)
    assert (shares[30:] == 1).all()
    assert (shares[:30] - 2 / 3).abs().max() < 0.06  # 6 standard deviations of 2,400 draws


def test_heads_and_layers_draw_apart() -> None:
    drawn = {tuple(one.tolist()) for one in kept(RandomEviction(keep=20, recent=10), 39).flatten(0, 1)}
    assert len(drawn) == 8


def test_benches_know_it() -> None:
    (one,) = candidates(["random:keep=7,recent=8"], [])
    assert one.policy == RandomEviction(keep=7, recent=8)
