"""Eviction at random: what any KV policy has to be better than. It is measured only; no server offers it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.kv_policies.policy import Slots
from engine.kv_policies.recent import protect_recent
from scheduler.kv_budget import Selection

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomEviction:
    """The ``recent`` newest tokens, and ``keep`` of which one that is drawn goes for each that comes, head by head."""

    name: ClassVar[str] = "random"

    keep: int = 128
    recent: int = 128
    slack: int = 1
    prompt_slack: int = 256

    def budget(self) -> Selection:
        """Both kinds together."""
        return Selection(slots=self.keep + self.recent, slack=self.slack, prompt_slack=self.prompt_slack)

    def score(self, slots: Slots) -> "Tensor":
        """A hash of the token's position, its head and the newest position, so that each selection draws anew."""
        layers, heads, _ = slots.positions.shape
        head = slots.positions.new_tensor(range(layers * heads)).view(layers, heads, 1)
        seed = (slots.positions.long() * 1_000_003 + head * 7_919 + int(slots.positions.max()) * 104_729) % (1 << 31)
        for _ in range(3):  # multiply and fold, as hash functions do
            seed = (seed * 1_103_515_245 + 12_345) % (1 << 31)
            seed = seed ^ (seed >> 15)
        return protect_recent(seed.float(), self.recent)
