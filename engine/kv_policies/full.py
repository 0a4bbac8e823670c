"""Every token keeps its KV."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """No policy at all: attention over the whole past."""

    name: ClassVar[str] = "full"

    def budget(self) -> None:
        """None: no limit."""
        return
