"""PyramidKV (Cai et al. 2024, §4): as SnapKV, with less and less from layer to layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.kv_policies.narrowing import narrowing
from engine.kv_policies.policy import Slots
from engine.kv_policies.snapkv import check_observed, observed_attention
from scheduler.kv_budget import Selection

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pyramid:
    """``keep`` tokens of the prompt on average over the layers: many in the first, where attention is spread out, and
    fewer and fewer towards the last, where it is not.

    The last ``observed`` tokens stay in every layer. Of the others, the last layer keeps 1/``steepness`` of the
    average, and the first as much more than that as the last keeps less. One block table serves all layers, so memory
    is that of the first layer, almost twice the average; the others read less. ``pooled`` as for snapkv.
    """

    name: ClassVar[str] = "pyramid"

    keep: int = 256
    observed: int = 32
    pooled: int = 5
    steepness: int = 20

    def budget(self) -> Selection:
        """What the first layer keeps."""
        check_observed(self.observed, self.pooled, self.keep)
        if self.steepness < 1:
            raise ValueError("steepness must be at least 1, for a pyramid as wide above as below")
        return Selection(slots=self.widths(2)[0], slack=None, prompt_slack=None, counted=self.observed)

    def widths(self, num_layers: int) -> list[int]:
        """How many tokens each layer keeps."""
        average = self.keep - self.observed
        last = average // self.steepness
        first = 2 * average - last
        return narrowing(self.observed + first, self.observed + last, num_layers)

    def score(self, slots: Slots) -> "Tensor":
        """As SnapKV's; −inf for all but a layer's share of them."""
        scores = observed_attention(slots, self.observed, self.pooled)
        order = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        widths = order.new_tensor(self.widths(len(scores)))
        return scores.masked_fill(order >= widths[:, None, None], float("-inf"))
