"""How much KV a sequence may hold. Integers only: which tokens survive inside the slots is the engine's to say.

A *slot* is a place in a sequence's block table. As long as nothing was taken from the table, a token's slot is its
position; behind a gap of ``num_dropped`` tokens it is that many less.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The newest ``window`` tokens and the first ``sinks``: whole blocks between the two fall away.

    A sliding window (Beltagy et al. 2020, §3.1) and, with sinks, StreamingLLM (Xiao et al. 2024, §3.2). What a token
    sees depends on its position alone, so it is the same however the prompt was cut into chunks.
    """

    window: int
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise ValueError("a window has at least 1 token, and not less than 0 sinks")

    @property
    def num_exact(self) -> int:
        """Tokens from the beginning on that see all before them: only their KV is what it would be without a budget."""
        return self.window + self.sinks

    def max_blocks(self, step_tokens: int, block_size: int) -> int:
        """Blocks that it takes at most while ``step_tokens`` are computed in a step.

        The window of the first of them, wherever in a block it begins, and those up to the last.
        """
        seen = self.window - 1 + step_tokens
        return self.num_sink_blocks(block_size) + (seen + block_size - 2) // block_size + 1

    def num_sink_blocks(self, block_size: int) -> int:
        """Blocks that stay for the sinks."""
        return -(-self.sinks // block_size)

    def droppable(self, num_computed: int, num_dropped: int, block_size: int) -> tuple[int, int]:
        """Which entries of the block table no token to come will see: the first, and how many."""
        first = self.num_sink_blocks(block_size)
        seen = max(num_computed - self.window + 1, 0) // block_size
        return first, max(seen - first - num_dropped // block_size, 0)


KVBudget = Window
"""What a request may be given instead of all the slots that it asks for."""
