"""The batching modes that the literature compares, as one rule: how many requests the next batch takes.

Orca (Yu et al. 2022, §3) calls batching per request what `none`, `static` and `dynamic` do, and per iteration what
`continuous` does. All four run on the same step; they differ only in when a request may enter it.
"""

import sys
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

    def places(self, waiting: int, waited: float) -> int:
        """How many of the ``waiting`` requests the next batch may take; the first has waited ``waited`` seconds."""
        match self.mode:
            case "continuous":
                return sys.maxsize
            case "none":
                return 1
            case "static":
                return self.size if waiting >= self.size else 0
            case "dynamic":
                return self.size if waiting >= self.size or waited >= self.delay else 0
