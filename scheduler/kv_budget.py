"""How much KV a sequence may hold. Integers only: which tokens survive inside the slots is the engine's to say.

A *slot* is a place in a sequence's block table. As long as nothing was taken from the table, a token's slot is its
position; behind a gap of ``num_dropped`` tokens it is that many less.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The newest ``window`` tokens and the first ``sinks``: whole blocks between the two fall away.

    A sliding window (Beltagy et al. 2020, §3.1) and, with sinks, StreamingLLM (Xiao et al. 2024, §3.2). What a token
    sees depends on its position alone, so it is the same however the prompt was cut into chunks.
    """

    window: int
    sinks: int = 0
    own: bool = False
    """Whether it is the model's, whose layers all see no further for any request: then each token's KV is what it
    always is, and its blocks are everybody's."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise ValueError("a window has at least 1 token, and not less than 0 sinks")
        if self.own and self.sinks:
            raise ValueError("a model's own window has no sinks")

    @property
    def num_exact(self) -> int:
        """Tokens from the beginning on whose KV is what it would be without a budget: of those that see all before
        them, or, if that is what the model itself lets them see, of all.
        """
        return sys.maxsize if self.own else self.window + self.sinks

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
        return first, max(self.first_seen(num_computed, block_size) - first - num_dropped // block_size, 0)

    def first_seen(self, num_computed: int, block_size: int) -> int:
        """The block, counted from the beginning of the text, where the window of the next token begins."""
        return max(num_computed - self.window + 1, 0) // block_size


UNLIMITED: Final = 2**31 - 1
"""More tokens than any sequence has."""

Counted = Literal["none", "all", "last"] | int
"""Which queries' attention a policy wants to know of each slot: of none, of all since, of the last one; or, a number,
of that many at the prompt's end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """``slots`` tokens that a policy selects, for each layer and KV head its own; anew when ``slack`` more are there.

    Attention does not mind the order of past keys, so every head's choice is gathered into the same slots, and one
    block table serves them all. When that happens depends on a token's position alone: a step never computes beyond.
    """

    slots: int
    slack: int | None = 1
    """1 is eviction at every step; None: at the prompt's end, and never again."""
    prompt_slack: int | None = 1
    """The same within the prompt, whose tokens come many at a time; None: not before the prompt's end."""
    counted: Counted = "none"

    def __post_init__(self) -> None:
        if self.slots < 1 or 0 in (self.slack, self.prompt_slack) or min(self.slack or 1, self.prompt_slack or 1) < 1:
            raise ValueError("a selection has at least 1 slot, and at least 1 token of slack")

    @property
    def keeps_mass(self) -> bool:
        """Whether attention is counted. Only a sequence's own queries can say how much there was, so it finds no prefix
        in a cache, and shares its blocks with nobody.
        """
        return self.counted != "none"

    def counts(self, prompt_left: int) -> bool:
        """Whether the next tokens' queries may count, of which ``prompt_left`` are the prompt's."""
        return self.counted in ("all", "last") or (self.counted != "none" and prompt_left > 0)

    @property
    def num_exact(self) -> int:
        """Tokens from the beginning on that see all before them, and whose KV others may share."""
        return 0 if self.keeps_mass else self.slots + min(self.slack or 0, self.prompt_slack or 0)

    def max_blocks(self, step_tokens: int, block_size: int) -> int:
        """Blocks that it takes at most, between one selection and the next."""
        if self.slack is None or self.prompt_slack is None:
            return UNLIMITED
        return -(-(self.slots + max(self.slack, self.prompt_slack)) // block_size)

    def is_due(self, num_slots: int, prompt_left: int) -> bool:
        """Whether the policy has to select before the next token; see `Sequence.prompt_left`."""
        if prompt_left == 0 and self.slack is None:
            return num_slots > self.slots
        slack = self.prompt_slack if prompt_left > 0 else self.slack
        return slack is not None and num_slots >= self.slots + slack

    def room(self, num_slots: int, prompt_left: int) -> int:
        """How many tokens may be computed until it has to; the prompt's end is a stop before that."""
        slack = self.prompt_slack if prompt_left > 0 else self.slack
        left = prompt_left if prompt_left > 0 else UNLIMITED
        if slack is None:
            return left
        if self.is_due(num_slots, prompt_left):
            num_slots = self.slots
        return min(self.slots + slack - num_slots, left)


KVBudget = Window | Selection
"""What a request may be given instead of all the slots that it asks for."""
