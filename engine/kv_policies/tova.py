"""TOVA, token omission via attention (Oren et al. 2024, §3.2): what the newest token attends to least goes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.kv_policies.policy import Slots
from engine.kv_policies.recent import protect_recent
from scheduler.kv_budget import Selection

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TOVA:
    """``keep`` tokens to which the newest one attends most, on average over a layer's heads, which all keep the same.

    The newest token itself always stays. ``slack`` and ``prompt_slack`` as for h2o; both 1 is the paper's algorithm.
    """

    name: ClassVar[str] = "tova"

    keep: int = 256
    slack: int = 16
    prompt_slack: int = 256

    def budget(self) -> Selection:
        """The tokens, and the last query's attention."""
        return Selection(slots=self.keep, slack=self.slack, prompt_slack=self.prompt_slack, counted="last")

    def score(self, slots: Slots) -> "Tensor":
        """The attention of all heads together."""
        return protect_recent(slots.mass.sum(dim=1, keepdim=True).expand_as(slots.mass), 1)
