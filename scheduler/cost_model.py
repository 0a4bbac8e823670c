"""How long a step takes, by what is in it: a roofline over tokens, and what attention, sampling and swapping add.

Up to ``knee`` tokens a step takes as long as reading the weights from memory does, whatever their number; beyond, as
long as multiplying by them (the roofline: Williams et al. 2009). Attention reads the KV of every sequence once, and
multiplies every query with every key before it. The coefficients are fitted to measured steps, or follow from a
device's figures (`scheduler.hardware`).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import NamedTuple, Self, TypeVar

from scheduler.least_squares import nonnegative

T = TypeVar("T")

_AFTER_TOKENS = ("per_context_token", "per_pair", "per_sample", "per_moved_token")
"""The coefficients of `Work`'s fields after the first."""
_KNEES_TRIED = 24
_REFINEMENTS = 30
_MOST_FITTED = 2000
"""Of more steps, so many are fitted to, spread evenly: a second of work."""


Share = tuple[int, int, int]
"""A sequence's part of a step: the position of its first token, how many are computed, how many sampled."""


class Work(NamedTuple):
    """What a step's time depends on."""

    tokens: int
    """Tokens computed."""
    context: int
    """Tokens whose KV is read, each sequence's once: the sum of the positions at which the items end."""
    pairs: int
    """Pairs of a computed token and a token that it attends to."""
    samples: int
    """Tokens sampled."""
    moved: int = 0
    """Tokens whose blocks move between the device and the host."""

    @classmethod
    def of(cls, shares: Iterable[Share], moved: int = 0) -> Self:
        """The work of a step that computes these shares and moves the blocks of ``moved`` tokens."""
        tokens = context = pairs = samples = 0
        for start, count, sampled in shares:
            tokens += count
            context += start + count
            pairs += start + 1 if count == 1 else count * start + count * (count + 1) // 2
            samples += sampled
        return cls(tokens, context, pairs, samples, moved)


class Observation(NamedTuple):
    """A step that was measured."""

    work: Work
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds of a step: base + per_token · max(tokens, knee) + per_context_token · context + per_pair · pairs +
    per_sample · samples + per_moved_token · moved.
    """

    base: float = 0.0
    """Seconds of every step: launches, Python."""
    per_token: float = 0.0
    """Seconds of arithmetic per token."""
    knee: float = 0.0
    """Tokens whose arithmetic takes as long as reading the weights; 0 where the time is linear."""
    per_context_token: float = 0.0
    """Seconds to read one token's KV."""
    per_pair: float = 0.0
    """Seconds of attention's arithmetic for a query and a key, in all layers."""
    per_sample: float = 0.0
    """Seconds to sample a token and hand it on."""
    per_moved_token: float = 0.0
    """Seconds to move one token's KV to the host or back."""
    source: str = ""
    """Where the figures are from, as a report should say it."""

    def __post_init__(self) -> None:
        numbers = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "source"}
        for name, number in numbers.items():
            if isinstance(number, bool) or not (isinstance(number, int | float) and 0 <= number < inf):
                raise ValueError(f"a cost model's {name} is a number that is not negative, not {number!r}")
        if not any(number for name, number in numbers.items() if name != "knee"):
            raise ValueError("a cost model in which a step takes no time")

    def seconds(self, work: Work) -> float:
        """How long a step of this work takes."""
        tokens, context, pairs, samples, moved = work
        return (
            self.base
            + self.per_token * max(tokens, self.knee)
            + self.per_context_token * context
            + self.per_pair * pairs
            + self.per_sample * samples
            + self.per_moved_token * moved
        )

    @classmethod
    def fit(cls, observations: Sequence[Observation], source: str = "") -> Self:
        """The model whose relative errors over measured steps have the least sum of squares.

        Relative, since a prefill step takes 50 decode steps' time and there are 100 decode steps for it. Relative to
        the model rather than to the measurement (by a second pass): otherwise the slow ones among equal steps count
        less than the fast ones, and the fit is below their mean. Raises ValueError without observations.
        """
        if not observations or min(seconds for _, seconds in observations) <= 0:
            raise ValueError("a cost model is fitted to steps that took some time")
        chosen = _spread(observations, _MOST_FITTED)
        model = cls._fit(chosen, [1 / seconds for _, seconds in chosen], source)
        return cls._fit(chosen, [1 / model.seconds(work) for work, _ in chosen], source)

    @classmethod
    def _fit(cls, observations: Sequence[Observation], weights: Sequence[float], source: str) -> Self:
        """The least sum of squares over all knees: those at an observed number of tokens, then between the best's."""
        tried = _spread(sorted({work.tokens for work, _ in observations}), _KNEES_TRIED)
        solved = {knee: _solve(observations, weights, knee) for knee in [0.0, *map(float, tried)]}
        knees = sorted(solved)
        best = knees.index(min(knees, key=lambda knee: solved[knee][1]))
        low, high = knees[max(best - 1, 0)], knees[min(best + 1, len(knees) - 1)]
        for _ in range(_REFINEMENTS):  # the error is piecewise smooth in the knee, and has one valley here
            left, right = low + (high - low) / 3, high - (high - low) / 3
            solved |= {knee: _solve(observations, weights, knee) for knee in (left, right)}
            low, high = (low, right) if solved[left][1] <= solved[right][1] else (left, high)
        knee = min(solved, key=lambda knee: solved[knee][1])
        base, per_token, *others = solved[knee][0]
        coefficients = dict(zip(_AFTER_TOKENS, others, strict=True))
        return cls(base=base, per_token=per_token, knee=knee if per_token else 0.0, **coefficients, source=source)

    def to_json(self) -> str:
        """An object of the fields, in seconds and tokens."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote; absent coefficients are 0. Raises ValueError, saying what is wrong."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("a cost model is a JSON object")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"a cost model has no {unknown[0]!r}, but {', '.join(sorted(known))}")
        if not isinstance(values.get("source", ""), str):
            raise ValueError("a cost model's source is text")
        return cls(**values)


def _solve(observations: Sequence[Observation], weights: Sequence[float], knee: float) -> tuple[list[float], float]:
    """The coefficients for a given knee, in the order of the formula, and their squared error."""
    rows = [
        (weight, weight * max(work.tokens, knee), *(weight * amount for amount in work[1:]))
        for (work, _), weight in zip(observations, weights, strict=True)
    ]
    target = [weight * seconds for (_, seconds), weight in zip(observations, weights, strict=True)]
    return nonnegative(list(zip(*rows, strict=True)), target)


def _spread(values: Sequence[T], most: int) -> Sequence[T]:
    """At most ``most`` of the values, evenly by rank, with the first and the last."""
    if len(values) <= most:
        return values
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]
