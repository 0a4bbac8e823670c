"""A sliding window (Longformer, Beltagy et al. 2020, §3.1): only the newest tokens keep their KV."""

from dataclasses import dataclass
from typing import ClassVar

from scheduler.kv_budget import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingWindow:
    """A token sees itself and the ``window`` − 1 tokens before it, in every layer."""

    name: ClassVar[str] = "window"

    window: int = 1024

    def budget(self) -> Window:
        """The window."""
        return Window(window=self.window)
