"""Beam search over one prompt's continuations: which live beams go on with which token, and what has been found.

The algorithm and its options are those of transformers' ``generate(num_beams=…)``: each step ranks all continuations of
all live beams by the sum of their tokens' log-probabilities. Of the ``width`` best, those that end become hypotheses;
the ``width`` best that do not end are the next live beams; an end ranked behind that is dropped. The ``width`` best
hypotheses are kept, by sum / length ** length_penalty (Wu et al. 2016, §7, with transformers' simpler length term). The
length counts output tokens, the one that ended it included.

No tensors: the engine brings the candidates and keeps the beams' KV.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from typing import Literal, NamedTuple

from engine.outputs import TokenLogprob
from scheduler.request import FinishReason, StopRule

Candidate = tuple[int, float]
"""(token id, natural log of its probability under the model), as in ``TokenLogprob.top``."""

MAX_LENGTH_PENALTY = 10.0
"""Either sign: 2 ** 20 tokens to that power are far from a float64's limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamParams:
    """What to prefer, and how long to search. Raises ValueError for what is out of range."""

    length_penalty: float = 1.0
    """The power of the length by which sums are divided: above 0 favours long outputs, 0 compares bare sums."""
    early_stopping: bool | Literal["never"] = False
    """When ``width`` hypotheses exist, stop: at once (True); once the best live beam, divided as if it ended now, is no
    better than the worst of them (False); once no live beam can become better, whatever its length ("never")."""

    def __post_init__(self) -> None:
        if not abs(self.length_penalty) <= MAX_LENGTH_PENALTY:
            raise ValueError(f"length_penalty is between {-MAX_LENGTH_PENALTY} and {MAX_LENGTH_PENALTY}")


@dataclass(frozen=True, slots=True)
class Extension:
    """A live beam of the next step: one of this step's, and the token appended to it."""

    parent: int
    """Index into this step's live beams. One parent can have several extensions, or none."""
    token: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A complete output."""

    logprobs: tuple[TokenLogprob, ...]
    """Its tokens, without the prompt, with the stop token if one ended it."""
    score: float
    """The sum of their log-probabilities / length ** length_penalty."""
    finish_reason: FinishReason

    @property
    def tokens(self) -> tuple[int, ...]:
        """Their ids."""
        return tuple(one.token_id for one in self.logprobs)


class BeamSearch:
    """One request's search. It starts with a single live beam, the prompt; a step costs the same at any length.

    ``width``, at least 1, is the number of live beams, and of hypotheses kept; one beam is greedy. Each token of a
    hypothesis comes with the ``num_top`` most likely ones of its place.
    """

    def __init__(self, width: int, params: BeamParams, stop: StopRule, *, num_top: int = 0) -> None:
        self._width = width
        self._params = params
        self._stop = stop
        self._num_top = num_top
        self._length = 0
        self._live = [_Node(None, TokenLogprob(-1, 0.0, ()), 0.0)]
        self._finished: list[_Finished] = []

    @property
    def num_candidates(self) -> int:
        """How many of its most likely next tokens each live beam has to bring (all, if the vocabulary has fewer).

        One of the ``width`` best continuations of all beams is one of the ``width`` best of its own beam. One of the
        ``width`` best that do not end is also that of its own beam, where only the stop tokens can rank in between.
        Nor do more than those drop out while stop tokens may not be chosen.
        """
        return max(self._width + len(self._stop.stop_token_ids), self._num_top)

    def advance(self, candidates: Sequence[Sequence[Candidate]]) -> tuple[Extension, ...]:
        """Take each live beam's candidates, most likely first; return the new live beams, best first.

        Nothing means that the search is over. Equal sums rank by beam, then as the candidates came. Tokens of
        probability 0 (or NaN) are never taken, so there can be fewer live beams than ``width``. If no beam can go on,
        the search is over; what is live then counts only if no hypothesis was found before.
        """
        if len(candidates) != len(self._live):
            raise ValueError(f"{len(candidates)} lists of candidates for {len(self._live)} live beams")
        length = self._length + 1
        tops = [tuple(own[: self._num_top]) for own in candidates]
        ends: list[_Finished] = []
        chosen: list[_Continuation] = []
        for rank, c in enumerate(self._ranked(candidates)):
            reason = self._stop.finish_reason(length, c.token)
            if reason is None:
                chosen.append(c)
            elif rank < self._width:
                ends.append(_Finished(self._score(c.total, length), self._node(c, tops), reason))
            if len(chosen) == self._width or (rank + 1 >= self._width and length == self._stop.max_tokens):
                break
        if not (chosen or ends or self._finished):
            ends = [_Finished(self._score(node.total, self._length), node, "length") for node in self._live]
        self._keep(ends)
        self._length = length
        if chosen and self._is_decided(chosen[0].total):
            chosen = []
        self._live = [self._node(c, tops) for c in chosen]
        return tuple(Extension(c.parent, c.token) for c in chosen)

    def best(self, count: int) -> list[Hypothesis]:
        """The ``count`` best hypotheses, best first. Fewer if there are no more; final once the search is over."""
        return [finished.hypothesis() for finished in self._finished[:count]]

    def _ranked(self, candidates: Sequence[Sequence[Candidate]]) -> Iterator[_Continuation]:
        """Every continuation that is possible and allowed, best first, and among equals in order.

        Lazily, since of ``width`` times ``num_candidates`` hardly more than ``width`` are looked at: the event loop,
        where this runs, is everybody's.
        """
        own = [self._continuations(parent, own) for parent, own in enumerate(candidates)]
        return merge(*own, key=lambda continuation: continuation.total, reverse=True)

    def _continuations(self, parent: int, candidates: Sequence[Candidate]) -> Iterator[_Continuation]:
        """The same of one live beam."""
        total = self._live[parent].total
        banned = self._stop.stop_token_ids if self._length < self._stop.min_tokens else frozenset()
        for token, logprob in candidates:
            if logprob > float("-inf") and token not in banned:
                yield _Continuation(total + logprob, parent, token, logprob)

    def _keep(self, finished: list[_Finished]) -> None:
        """Add hypotheses, and forget those beyond the ``width`` best."""
        if finished:
            self._finished.extend(finished)
            self._finished.sort(key=lambda one: one.score, reverse=True)
            del self._finished[self._width :]

    def _is_decided(self, best_live: float) -> bool:
        """Whether to stop although beams could go on, of which the best has the sum ``best_live``."""
        params = self._params
        if len(self._finished) < self._width:
            return False
        if params.early_stopping is True or self._width == 1:  # one beam is greedy, whatever else could be found
            return True
        # Sums only fall. With a positive penalty the longest output divides them by most, else the shortest does.
        longest = params.early_stopping == "never" and params.length_penalty > 0
        return self._score(best_live, self._stop.max_tokens if longest else self._length) <= self._finished[-1].score

    def _score(self, total: float, length: int) -> float:
        return total / math.pow(max(length, 1), self._params.length_penalty)

    def _node(self, continuation: _Continuation, tops: Sequence[tuple[Candidate, ...]]) -> _Node:
        chosen = TokenLogprob(continuation.token, continuation.logprob, tops[continuation.parent])
        return _Node(self._live[continuation.parent], chosen, continuation.total)


class _Continuation(NamedTuple):
    """A candidate together with the live beam that it would extend."""

    total: float
    parent: int
    token: int
    logprob: float


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Node:
    """A beam's last token. Beams share their past through ``parent``; a past that no beam has any more is freed."""

    parent: _Node | None
    """None: the prompt."""
    chosen: TokenLogprob
    total: float
    """The sum of the log-probabilities up to here."""


class _Finished(NamedTuple):
    """A hypothesis whose tokens have not been collected yet."""

    score: float
    node: _Node
    reason: FinishReason

    def hypothesis(self) -> Hypothesis:
        """Collect them, from the last to the first."""
        logprobs, node = [], self.node
        while node.parent is not None:
            logprobs.append(node.chosen)
            node = node.parent
        return Hypothesis(tuple(reversed(logprobs)), self.score, self.reason)
