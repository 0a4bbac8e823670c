"""Key norms (Devoto et al. 2024, §3): keys of small norm get much attention, so they stay."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.kv_policies.policy import Slots
from engine.kv_policies.recent import protect_recent
from scheduler.kv_budget import Selection

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class KNorm:
    """``keep`` tokens whose keys have the smallest L2 norm, for each layer and KV head its own, and the newest ones.

    It needs no attention, so it shares prefixes like any other request. ``slack`` and ``prompt_slack`` as for h2o.
    """

    name: ClassVar[str] = "knorm"

    keep: int = 128
    recent: int = 128
    slack: int = 16
    prompt_slack: int = 256

    def budget(self) -> Selection:
        """Both kinds together."""
        return Selection(slots=self.keep + self.recent, slack=self.slack, prompt_slack=self.prompt_slack)

    def score(self, slots: Slots) -> "Tensor":
        """The smaller the norm, the higher; recent tokens above all."""
        return protect_recent(-slots.keys().float().norm(dim=-1), self.recent)
