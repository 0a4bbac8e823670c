"""Which tokens the grammars of a step's rows allow: found out while the model computes, in threads of their own."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from engine.grammar_matcher import GrammarMatcher

_MOST_THREADS = 4
_ROWS_PER_THREAD = 16
"""Rows that one thread takes; another for fewer would cost more than it saves, at 0.03 ms each."""

_Bits = np.ndarray[tuple[int, int], np.dtype[np.uint8]]


class TokenMasks:
    """Computes masks. The library lets go of Python's lock meanwhile, so nothing waits but what needs the result."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._threads = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="octavo-masks")

    def begin(self, matchers: Sequence[GrammarMatcher | None]) -> "PendingMasks":
        """Begin with the masks of a step's rows, one for each that has a matcher."""
        rows = [index for index, matcher in enumerate(matchers) if matcher is not None]
        wanted = [matcher for matcher in matchers if matcher is not None]
        size = max(-(-len(wanted) // _MOST_THREADS), _ROWS_PER_THREAD)
        parts = [wanted[start : start + size] for start in range(0, len(wanted), size)]
        return PendingMasks(rows, [self._threads.submit(self._allowed, part) for part in parts])

    def _allowed(self, matchers: Sequence[GrammarMatcher]) -> _Bits:
        """[len(matchers), vocab] of 0 and 1."""
        masks = np.frombuffer(b"".join(matcher.mask() for matcher in matchers), np.uint8).reshape(len(matchers), -1)
        # The tokenizer may know tokens that the model does not, never the other way round.
        return np.unpackbits(masks, axis=1, count=self._vocab_size, bitorder="little")


class PendingMasks:
    """Masks under way."""

    def __init__(self, rows: Sequence[int], parts: "Sequence[Future[_Bits]]") -> None:
        self._rows = rows
        self._parts = parts

    def result(self, device: torch.device) -> Mapping[int, Tensor]:
        """By row, where it has a matcher: [vocab] bool, whether a token may come next."""
        if not self._rows:
            return {}
        allowed = torch.from_numpy(np.concatenate([part.result() for part in self._parts])).to(device).bool()
        return dict(zip(self._rows, allowed.unbind(), strict=True))
