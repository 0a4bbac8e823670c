"""How long a step takes, by what is in it: a roofline over tokens, and what attention and sampling add.

Up to ``knee`` tokens a step takes as long as reading the weights from memory does, whatever their number; beyond, as
long as multiplying by them (the roofline: Williams et al. 2009). Attention reads the KV of every sequence once, and
multiplies every query with every key before it. The coefficients are fitted to measured steps, or follow from a
device's figures (`scheduler.hardware`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple, Self

from scheduler.batch import ScheduledBatch
from scheduler.least_squares import nonnegative

_KNEES_TRIED = 24
_REFINEMENTS = 30


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

    @classmethod
    def of(cls, batch: ScheduledBatch) -> Self:
        """The work of a scheduled step."""
        context = pairs = samples = 0
        for item in batch.items:
            start, count = item.start, len(item.tokens)
            context += start + count
            pairs += start + 1 if count == 1 else count * start + count * (count + 1) // 2
            samples += item.num_samples
        return cls(batch.num_tokens, context, pairs, samples)


class Observation(NamedTuple):
    """A step that was measured."""

    work: Work
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds of a step: base + per_token · max(tokens, knee) + per_context_token · context + per_pair · pairs +
    per_sample · samples.
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
    source: str = ""
    """Where the figures are from, as a report should say it."""

    def __post_init__(self) -> None:
        numbers = [getattr(self, field.name) for field in fields(self) if field.name != "source"]
        if not all(isinstance(number, int | float) and 0 <= number < float("inf") for number in numbers):
            raise ValueError("the coefficients of a cost model are numbers that are not negative")
        if not (self.base > 0 or self.per_token > 0):
            raise ValueError("a cost model in which a step takes no time")

    def seconds(self, work: Work) -> float:
        """How long a step of this work takes."""
        tokens, context, pairs, samples = work
        return (
            self.base
            + self.per_token * max(tokens, self.knee)
            + self.per_context_token * context
            + self.per_pair * pairs
            + self.per_sample * samples
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
        model = cls._fit(observations, [1 / seconds for _, seconds in observations], source)
        return cls._fit(observations, [1 / model.seconds(work) for work, _ in observations], source)

    @classmethod
    def _fit(cls, observations: Sequence[Observation], weights: Sequence[float], source: str) -> Self:
        """The least sum of squares over all knees: those at an observed number of tokens, then between the best's."""
        tried = _spread([float(tokens) for tokens in sorted({work.tokens for work, _ in observations})])
        solved = {knee: _solve(observations, weights, knee) for knee in [0.0, *tried]}
        knees = sorted(solved)
        best = knees.index(min(knees, key=lambda knee: solved[knee][1]))
        low, high = knees[max(best - 1, 0)], knees[min(best + 1, len(knees) - 1)]
        for _ in range(_REFINEMENTS):  # the error is piecewise smooth in the knee, and has one valley here
            left, right = low + (high - low) / 3, high - (high - low) / 3
            solved |= {knee: _solve(observations, weights, knee) for knee in (left, right)}
            low, high = (low, right) if solved[left][1] <= solved[right][1] else (left, high)
        knee = min(solved, key=lambda knee: solved[knee][1])
        base, per_token, per_context_token, per_pair, per_sample = solved[knee][0]
        return cls(
            base=base,
            per_token=per_token,
            knee=knee if per_token else 0.0,
            per_context_token=per_context_token,
            per_pair=per_pair,
            per_sample=per_sample,
            source=source,
        )

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
        return cls(**values)


def _solve(observations: Sequence[Observation], weights: Sequence[float], knee: float) -> tuple[list[float], float]:
    """The coefficients for a given knee, in the order of the formula, and their squared error."""
    rows = [
        (weight, weight * max(work.tokens, knee), weight * work.context, weight * work.pairs, weight * work.samples)
        for (work, _), weight in zip(observations, weights, strict=True)
    ]
    target = [weight * seconds for (_, seconds), weight in zip(observations, weights, strict=True)]
    return nonnegative(list(zip(*rows, strict=True)), target)


def _spread(values: Sequence[float]) -> Sequence[float]:
    """At most ``_KNEES_TRIED`` of the sorted values, evenly by rank, with the first and the last."""
    if len(values) <= _KNEES_TRIED:
        return values
    return [values[round(index * (len(values) - 1) / (_KNEES_TRIED - 1))] for index in range(_KNEES_TRIED)]
