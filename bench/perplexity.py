"""Perplexity over windows of a text, by KV policy: what the tokens that a policy drops were worth."""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from bench import output
from bench.policy_list import Candidate
from bench.progress import progress
from bench.teacher_forcing import Steps, load, score
from bench.windows import cut
from engine.config import EngineConfig
from engine.engine_info import EngineInfo
from engine.errors import ConfigError
from engine.launch import LoadedModel


@dataclass(frozen=True, slots=True)
class Perplexity:
    """One policy's."""

    label: str
    given: str
    budget: int | None
    perplexity: float
    """exp of the mean over all scored tokens of −ln p(token), as are the windows'."""
    by_window: list[float]


@dataclass(frozen=True)
class Windows:
    """The measurement: windows that begin anew, each scored behind its first tokens."""

    loaded: LoadedModel
    info: EngineInfo
    texts: Sequence[Sequence[int]]
    steps: Steps
    skip: int
    text_name: str

    @classmethod
    def of(cls, args: argparse.Namespace, config: EngineConfig) -> "Windows":
        """Load the model and cut the text. Raises ConfigError."""
        if args.skip > args.window - 2:
            raise ConfigError(f"--skip must leave a token to score of --window {args.window}, not be {args.skip}")
        loaded, info = load(config)
        texts = cut(args.text, loaded.checkpoint.tokenizer, args.segments, args.window)
        steps = Steps.of(args, config, loaded)
        return cls(loaded, info, texts, steps, args.skip, PurePath(args.text).name)

    @property
    def heading(self) -> str:
        """What was measured on what."""
        scored = len(self.texts[0]) - 1 - self.skip
        windows = f"{len(self.texts)} windows" if len(self.texts) > 1 else "a window"
        return (
            f"{self.info.model_name}, {self.info.dtypes}, {self.text_name}: {windows} of "
            f"{len(self.texts[0]):,} tokens, the last {scored:,} of each scored, {len(self.texts) * scored:,} in all"
        )

    def each(self, candidates: Sequence[Candidate]) -> Iterator[Perplexity]:
        """Measure one policy after the other."""
        for candidate in candidates:
            with progress(candidate.label, sum(map(len, self.texts)), "tok") as bar:
                on_tokens = bar.update
                scores = score(
                    self.loaded, candidate.policy, self.texts, self.steps, skip=self.skip, on_tokens=on_tokens
                )
            means = scores.nll.double().nanmean(dim=1)
            yield Perplexity(
                candidate.label, candidate.given, candidate.budget, math.exp(means.mean()), means.exp().tolist()
            )

    def table(self, found: Sequence[Perplexity]) -> str:
        """A row per policy."""
        full = next((one.perplexity for one in found if one.budget is None), None)
        head = ["policy", "tokens\nkept", "\nperplexity", "over\nfull's", "windows,\nlowest", "\nhighest"]
        return output.table(
            head,
            [
                [
                    one.label,
                    "all" if one.budget is None else f"{one.budget:,}",
                    output.figure(one.perplexity),
                    "-" if full is None else f"{one.perplexity / full:.3f}",
                    output.figure(min(one.by_window)),
                    output.figure(max(one.by_window)),
                ]
                for one in found
            ],
        )

    def draw(self, path: str, found: Sequence[Perplexity]) -> None:
        """Perplexity against the tokens kept, a line per policy."""
        from bench.figures import against_budget, logarithmic, picture

        with picture(path, 1, title="Perplexity against the KV that is kept", width=8) as (axes,):
            against_budget(axes, [(one.given, one.budget, one.perplexity) for one in found])
            axes.set(yscale="log", ylabel="perplexity, logarithmic")
            logarithmic(axes.yaxis)
