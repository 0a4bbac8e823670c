"""SpAtten (Wang et al. 2021, §3): tokens and heads are pruned in cascades, values and bits within attention."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.kv_policies.narrowing import narrowing
from engine.kv_policies.policy import Slots
from kernels.pruning import Pruning
from scheduler.kv_budget import Selection

if TYPE_CHECKING:
    from torch import Tensor

_FIRST_TOKENS = 0.15
_FIRST_HEADS = 0.30
"""The shares of the layers from which on tokens, and heads, are pruned (§3.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpAtten:
    """The ``keep`` most important tokens, ``keep_last`` in the last layer: fewer from layer to layer, always some of
    those that the layer before kept.

    A token's importance is the attention that it got so far in all layers up to this one, over all heads, which keep
    the same. The first ``sinks`` tokens and the newest ``recent`` stay in every layer. ``slack`` and ``prompt_slack``
    as for h2o.

    Likewise ``heads`` is the share of KV heads that are left in the last layer; a head's importance is the sum of the
    absolute values of what its attention gave so far. ``values`` is the share of a query's values, those of its
    smallest probabilities, that are left out. With ``high_bits``, the answer's queries compute their scores from so
    many bits of themselves and of the keys, and again with ``low_bits`` more where no probability reaches
    ``threshold``.
    """

    name: ClassVar[str] = "spatten"

    keep: int = 256
    keep_last: int = 192
    sinks: int = 4
    recent: int = 64
    slack: int = 16
    prompt_slack: int = 256
    heads: float = 1.0
    values: float = 0.0
    high_bits: int = 0
    low_bits: int = 4
    threshold: float = 0.1

    def budget(self) -> Selection:
        """What the first layers keep."""
        if not self.sinks + self.recent <= self.keep_last <= self.keep:
            raise ValueError("keep_last must be at least sinks + recent, and at most keep")
        if not (0 < self.heads <= 1 and 0 <= self.values < 1):
            raise ValueError("heads must be more than 0 and at most 1, values at least 0 and less than 1")
        if self.high_bits not in (0, *range(2, 13)) or self.low_bits > 8:
            raise ValueError("high_bits must be 0 or from 2 to 12, low_bits at most 8")
        return Selection(slots=self.keep, slack=self.slack, prompt_slack=self.prompt_slack, counted="all")

    def pruning(self) -> Pruning | None:
        """Values and bits."""
        if self.heads == 1 and self.values == 0 and self.high_bits == 0:
            return None
        return Pruning(self.values, self.high_bits, self.low_bits, self.threshold)

    def score(self, slots: Slots) -> "Tensor":
        """The importance of what a layer keeps, −inf for the rest; the same for all heads."""
        positions, num_layers = slots.positions[:, 0].long(), len(slots.mass)
        held = positions >= 0
        own = slots.mass.sum(1).masked_fill(~held, 0.0)
        # Layers hold different tokens in their slots, so they meet by position; where nothing is held, at one more.
        places = positions.masked_fill(~held, int(positions.max()) + 1)
        total = own.new_zeros(num_layers, int(positions.max()) + 2).scatter_add_(1, places, own).cumsum(0)
        total[:, : self.sinks] = total[:, total.shape[1] - 1 - self.recent : -1] = float("inf")
        total[:, -1] = float("-inf")
        for layer, kept in enumerate(narrowing(self.keep, self.keep_last, num_layers, _FIRST_TOKENS)):
            there = total.new_full(total.shape[1:], float("-inf"))
            there[places[layer]] = total[layer, places[layer]]
            there[-1] = float("-inf")
            if layer:
                there.masked_fill_(total[layer - 1].isneginf(), float("-inf"))
            order = there.argsort(descending=True, stable=True)
            total[layer] = there.index_fill(0, order[kept:], float("-inf"))
        return total.gather(1, places).unsqueeze(1).expand_as(slots.mass)

    def heads_off(self, slots: Slots) -> "Tensor":
        """Which heads are of the least importance; once off, off in all layers above and for good."""
        if self.heads == 1:
            return slots.off
        num_layers, num_heads = slots.output.shape
        total, off = slots.output.cumsum(0), slots.off.clone()
        least = max(round(self.heads * num_heads), 1)
        for layer, kept in enumerate(narrowing(num_heads, least, num_layers, _FIRST_HEADS)):
            if layer:
                off[layer] |= off[layer - 1]
            order = total[layer].masked_fill(off[layer], float("-inf")).argsort(descending=True, stable=True)
            off[layer, order[kept:]] = True
        return off
