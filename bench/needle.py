"""A needle in a haystack: a number told somewhere in filler text, asked for at its end, by KV policy and depth.

(Kamradt 2023; passkey retrieval, Mohtashami and Jaggi 2023.)
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath
from statistics import fmean

from bench import output
from bench.answers import answering
from bench.policy_list import Candidate
from bench.progress import progress
from bench.windows import cut
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.engine_info import EngineInfo
from engine.errors import ConfigError
from engine.launch import load_engine
from engine.tokenizer import Tokenizer

_NAMES = ("Alma", "Boris", "Clara", "David", "Edith", "Frank", "Grete", "Henry", "Irene", "Jonas")
_DEPTHS = 5
"""Columns of the table."""


@dataclass(frozen=True, slots=True)
class Needle:
    """One trial."""

    prompt: list[int]
    answer: str
    depth: float
    """Where in the filler the needle is: 0 at its beginning, 1 at its end."""


@dataclass(frozen=True, slots=True)
class Retrieval:
    """One policy's."""

    label: str
    given: str
    budget: int | None
    accuracy: float
    """Numbers found, a share of all trials, as are those by depth: equal stretches of the filler from its beginning."""
    by_depth: list[float]
    found: list[bool]
    """Of each trial, from the shallowest to the deepest."""


@dataclass(frozen=True)
class Needles:
    """The measurement: trials with the needle at depths that are evenly spread."""

    engine: AsyncEngine
    trials: Sequence[Needle]
    length: int
    source: str

    @classmethod
    def of(cls, args: argparse.Namespace, config: EngineConfig) -> "Needles":
        """Load the engine and plant the needles. Raises ConfigError."""
        if args.needle < _DEPTHS:
            raise ConfigError(f"--needle must be at least {_DEPTHS}, a trial for each depth, not {args.needle}")
        engine = load_engine(config)
        texts = cut(args.text, engine.tokenizer, args.segments, args.window)
        source = random.Random(args.seed)
        trials = [
            plant(texts[index % len(texts)], (index + 0.5) / args.needle, source, engine.tokenizer)
            for index in range(args.needle)
        ]
        return cls(engine, trials, args.window, PurePath(args.text).name)

    @property
    def info(self) -> EngineInfo:
        """The engine's."""
        return self.engine.info

    @property
    def heading(self) -> str:
        """What was measured on what."""
        return (
            f"{self.info.model_name}, {self.info.dtypes}: {len(self.trials)} needles, each in "
            f"{self.length:,} tokens of {self.source}"
        )

    def each(self, candidates: Sequence[Candidate]) -> Iterator[Retrieval]:
        """Measure one policy after the other."""
        tokenizer, prompts = self.engine.tokenizer, [trial.prompt for trial in self.trials]
        most = max(len(tokenizer.encode(trial.answer, add_special_tokens=False)) for trial in self.trials) + 2
        with answering(self.engine) as asking:
            for candidate in candidates:
                with progress(candidate.label, len(prompts), "needle") as bar:
                    answers = asking.greedy(prompts, candidate.policy, most, bar.update)
                texts = [tokenizer.decode(answer).strip() for answer in answers]
                yield _retrieval(
                    candidate, [text.startswith(trial.answer) for text, trial in zip(texts, self.trials, strict=True)]
                )

    def table(self, found: Sequence[Retrieval]) -> str:
        """A row per policy, a column per depth."""
        step = 100 // _DEPTHS
        depths = [f"\n{index * step}–{(index + 1) * step}%" for index in range(_DEPTHS)]
        head = ["policy", "tokens\nkept", "numbers\nfound", f"at depth{depths[0]}", *depths[1:]]
        return output.table(
            head,
            [
                [
                    one.label,
                    "all" if one.budget is None else f"{one.budget:,}",
                    *(f"{share:.0%}" for share in (one.accuracy, *one.by_depth)),
                ]
                for one in found
            ],
        )

    def draw(self, path: str, found: Sequence[Retrieval]) -> None:
        """Accuracy against the tokens kept."""
        from bench.figures import against_budget, picture

        with picture(path, 1, title="Needles found against the KV that is kept", width=8) as (axes,):
            against_budget(axes, [(one.given, one.budget, 100 * one.accuracy) for one in found])
            axes.set(ylim=(-2, 102), ylabel="% of the needles found")


def plant(filler: Sequence[int], depth: float, source: random.Random, tokenizer: Tokenizer) -> Needle:
    """A trial: a number told at a depth of the filler, and asked for behind it."""
    name, number = source.choice(_NAMES), str(source.randrange(10_000, 100_000))
    place = round(depth * len(filler))

    def tokens(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    told = tokens(f"\nThe secret number of {name} is {number}.\n")
    asked = tokens(f"\nThe secret number of {name} is")
    return Needle([*filler[:place], *told, *filler[place:], *asked], number, depth)


def _retrieval(candidate: Candidate, found: list[bool]) -> Retrieval:
    """The trials' outcome by depth; they come from the shallowest to the deepest."""
    edges = [round(index * len(found) / _DEPTHS) for index in range(_DEPTHS + 1)]
    by_depth = [fmean(found[start:end]) for start, end in pairwise(edges)]
    return Retrieval(candidate.label, candidate.given, candidate.budget, fmean(found), by_depth, found)
