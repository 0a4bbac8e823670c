"""The batching modes that the literature compares, as one rule: how many requests the next batch takes.

Orca (Yu et al. 2022, §3) calls batching per request what `none`, `static` and `dynamic` do, and per iteration what
`continuous` does. All four run on the same step; they differ only in when a request may enter it.
"""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["none", "static", "dynamic", "continuous"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """When requests may begin to run.

    `continuous`: as soon as there is room. `none`: one request at a time. `static`: ``size`` requests together, once
    so many wait. `dynamic`: up to ``size`` together, once so many wait or one has waited ``delay`` seconds. In the last
    two, as with `none`, no request joins a batch that runs: its places stay empty until its longest request has ended.
    """

    mode: Mode = "continuous"
    size: int = 8
    delay: float = 0.05

    @property
    def refills(self) -> bool:
        """Whether requests may join while others run."""
        return self.mode == "continuous"

    def due(self, arrival: float) -> float | None:
        """When a request that came at ``arrival`` has waited long enough, however few others wait."""
        return arrival + self.delay if self.mode == "dynamic" else None

    def places(self, waiting: int, arrival: float, now: float) -> int:
        """How many of the ``waiting`` requests a new batch takes at most; the first of them came at ``arrival``."""
        if self.mode == "none":
            return 1
        due = self.due(arrival)
        return self.size if waiting >= self.size or (due is not None and now >= due) else 0
