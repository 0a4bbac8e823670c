"""Where one continuation stands in its grammar: which tokens may come next, and whether it is complete."""

import re
import time
from typing import Final

import llguidance

_CREDIT = 1.0
"""Seconds of a core that a continuation's masks may take in all, plus ``_SECONDS_PER_TOKEN`` for each of its tokens."""
_SECONDS_PER_TOKEN = 0.01
"""A JSON schema's mask takes 0.03 ms on average, measured on SmolLM2's 49,152 tokens; a hostile grammar's takes 500."""

_QUOTED: Final = re.compile(r"\n\s*\d+ \| ")


class GrammarMatcher:
    """Follows one continuation, and lives as long as it does: a preemption takes nothing from it.

    One thread at a time uses it. Nothing here raises: what goes wrong is in ``failure``, and ends the request.
    """

    __slots__ = ("_beginning", "_matcher", "_num_tokens", "_seconds", "failure")

    def __init__(self, beginning: llguidance.LLMatcher) -> None:
        self._beginning = beginning
        self._matcher: llguidance.LLMatcher | None = None
        self._num_tokens = 0
        self._seconds = 0.0
        self.failure: str | None = None
        """Why the grammar cannot be followed any further, in words for the client."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow: the text is whole."""
        return self.failure is None and self._matcher is not None and self._matcher.is_stopped()

    def mask(self) -> bytes:
        """Which tokens may come next: one bit per token, the lowest first, padded to a multiple of 4 bytes.

        The end of text is among them where the grammar accepts, and the only one where it has failed.
        """
        began = time.thread_time()
        if self._matcher is None:  # copied here and not before: a large one takes a millisecond, and n may be 128
            self._matcher = self._beginning.deep_copy()
        mask = self._matcher.compute_bitmask()
        self._seconds += time.thread_time() - began
        if self._seconds > _CREDIT + _SECONDS_PER_TOKEN * self._num_tokens:
            self.failure = "it takes too long to find out what may come next"
        return mask

    def accept(self, token: int) -> None:
        """Go on by a token that the last mask allowed."""
        assert self._matcher is not None
        self._num_tokens += 1
        if self.failure is None and not self._matcher.consume_token(token):
            self.failure = one_line(self._matcher.get_error())


def one_line(message: str) -> str:
    """An error message of the library as part of a line, without the grammar that it quotes line by line."""
    return " ".join(_QUOTED.split(message.removesuffix("<non-verbose/>"), maxsplit=1)[0].split())[:300]
