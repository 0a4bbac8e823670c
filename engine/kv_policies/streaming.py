"""StreamingLLM (Xiao et al. 2024, §3.2): a sliding window, and a few first tokens as attention sinks."""

from dataclasses import dataclass
from typing import ClassVar

from scheduler.kv_budget import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """A token sees the first ``sinks`` tokens, itself and the ``window`` − 1 tokens before it.

    Positions are counted inside the cache: the sinks are never farther away than ``sinks`` + ``window`` − 1, so a
    stream may run past the length that the model was trained for, for ever and at constant memory.
    """

    name: ClassVar[str] = "streaming"

    sinks: int = 4
    window: int = 1020

    def budget(self) -> Window:
        """The window, and the sinks."""
        if self.sinks < 1:
            raise ValueError("streaming needs at least 1 sink; without any it is the policy 'window'")
        return Window(window=self.window, sinks=self.sinks)
