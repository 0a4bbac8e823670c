"""SnapKV (Li et al. 2024, §4): the end of a prompt tells which of its tokens will be attended to."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.kv_policies.policy import Slots
from engine.kv_policies.recent import protect_recent
from scheduler.kv_budget import Selection

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV:
    """``keep`` tokens of the prompt: its last ``observed``, and those to which these attend most, neighbours included.

    For each layer and KV head its own, once, when the prompt has been computed; the answer's tokens all stay. A token's
    attention is averaged with that of ``pooled`` neighbours, itself among them, so that whole passages are kept.
    """

    name: ClassVar[str] = "snapkv"

    keep: int = 256
    observed: int = 32
    pooled: int = 5

    def budget(self) -> Selection:
        """At the prompt's end only, by the attention of its last queries."""
        check_observed(self.observed, self.pooled, self.keep)
        return Selection(slots=self.keep, slack=None, prompt_slack=None, counted=self.observed)

    def score(self, slots: Slots) -> "Tensor":
        """The attention around each token; the observing ones above all."""
        return observed_attention(slots, self.observed, self.pooled)


def check_observed(observed: int, pooled: int, keep: int) -> None:
    """Raise ValueError unless some tokens observe, and they fit into what is kept."""
    if not 1 <= observed <= keep:
        raise ValueError(f"observed must be at least 1 and at most what is kept, {keep}, not {observed}")
    if pooled % 2 == 0:
        raise ValueError(f"pooled must be an odd number, not {pooled}")


def observed_attention(slots: Slots, observed: int, pooled: int) -> "Tensor":
    """[L, Hkv, n]: the attention that each slot and its neighbours got on average; the last ``observed`` above all."""
    before = slots.mass[..., :-observed]
    padded = before.new_zeros(*before.shape[:-1], before.shape[-1] + pooled - 1)
    padded[..., pooled // 2 : pooled // 2 + before.shape[-1]] = before
    scores = slots.mass.clone()
    scores[..., :-observed] = padded.unfold(-1, pooled, 1).mean(-1)
    return protect_recent(scores, observed)
