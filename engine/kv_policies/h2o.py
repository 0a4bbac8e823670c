"""H2O, heavy-hitter oracle (Zhang et al. 2023, §4): tokens that got much attention stay, and the newest ones."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.kv_policies.policy import Slots
from engine.kv_policies.recent import protect_recent
from scheduler.kv_budget import Selection

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class H2O:
    """``heavy`` tokens by accumulated attention, for each layer and KV head its own, and the ``recent`` newest.

    The score is the sum of the attention probabilities that a token got from every query since, over what was kept
    then. ``slack`` tokens more than that are kept before the lightest go; 1 is the paper's algorithm, one eviction at
    every step. ``prompt_slack`` is the same within a prompt.
    """

    name: ClassVar[str] = "h2o"

    heavy: int = 128
    recent: int = 128
    slack: int = 16
    prompt_slack: int = 256

    def budget(self) -> Selection:
        """Both kinds together."""
        return Selection(
            slots=self.heavy + self.recent, slack=self.slack, prompt_slack=self.prompt_slack, counted="all"
        )

    def score(self, slots: Slots) -> "Tensor":
        """The mass; recent tokens above all."""
        return protect_recent(slots.mass, self.recent)
