"""How far greedy answers under a KV policy are those of the full cache: until the first token that differs."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from statistics import fmean
from typing import Any

from bench import output
from bench.answers import Answering, answering
from bench.policy_list import Candidate
from bench.progress import progress
from bench.prompts import parse_jsonl
from bench.windows import cut
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.engine_info import EngineInfo
from engine.errors import ConfigError
from engine.kv_policies.full import Full
from engine.launch import load_engine
from engine.tokenizer import Tokenizer
from server.chat_template import ChatTemplate, load_template


@dataclass(frozen=True, slots=True)
class Agreement:
    """One policy's, on average over the prompts."""

    label: str
    given: str
    budget: int | None
    until_first_difference: float
    """Tokens that are the full cache's, from the answer's beginning on."""
    share_until_first_difference: float
    """The same as a share of the full cache's answer, 0 to 1, as are the next two."""
    equal_tokens: float
    """Tokens that are the full cache's at the same place."""
    equal_answers: float
    by_prompt: list[int]
    """Tokens until the first difference, of each."""


@dataclass(frozen=True)
class Generation:
    """The measurement: prompts, and as many tokens as an answer may have."""

    engine: AsyncEngine
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    source: str

    @classmethod
    def of(cls, args: argparse.Namespace, config: EngineConfig) -> "Generation":
        """Load the engine and read the prompts. Raises ConfigError."""
        engine = load_engine(config)
        if args.prompts:
            prompts = read_prompts(args.prompts, engine.tokenizer)[: args.segments]
            return cls(engine, prompts, args.generate, PurePath(args.prompts).name)
        prompts = cut(args.text, engine.tokenizer, args.segments, args.window)
        source = f"windows of {args.window:,} tokens of {PurePath(args.text).name}"
        return cls(engine, prompts, args.generate, source)

    @property
    def info(self) -> EngineInfo:
        """The engine's."""
        return self.engine.info

    @property
    def heading(self) -> str:
        """What was measured on what."""
        return (
            f"{self.info.model_name}, {self.info.dtypes}: greedy answers of up to {self.max_tokens:,} tokens "
            f"to {len(self.prompts)} prompts, {self.source}, compared with those of the full cache"
        )

    def each(self, candidates: Sequence[Candidate]) -> Iterator[Agreement]:
        """Measure one policy after the other."""
        with answering(self.engine) as asking:
            wanted = self._answers(asking, Candidate(Full(), "full", None))
            for candidate in candidates:
                yield compare(candidate, wanted, self._answers(asking, candidate))

    def _answers(self, asking: Answering, candidate: Candidate) -> list[list[int]]:
        with progress(candidate.label, len(self.prompts), "answer") as bar:
            return asking.greedy(self.prompts, candidate.policy, self.max_tokens, bar.update)

    def table(self, found: Sequence[Agreement]) -> str:
        """A row per policy."""
        head = ["policy", "tokens\nkept", "tokens until\n1st difference", "of\nall", "equal\ntokens", "equal\nanswers"]
        return output.table(
            head,
            [
                [
                    one.label,
                    "all" if one.budget is None else f"{one.budget:,}",
                    f"{one.until_first_difference:.1f}",
                    f"{one.share_until_first_difference:.0%}",
                    f"{one.equal_tokens:.0%}",
                    f"{one.equal_answers:.0%}",
                ]
                for one in found
            ],
        )

    def draw(self, path: str, found: Sequence[Agreement]) -> None:
        """The share until the first difference against the tokens kept."""
        from bench.figures import against_budget, picture

        with picture(path, 1, title="Greedy answers: how far they are the full cache's", width=8) as (axes,):
            against_budget(axes, [(one.given, one.budget, 100 * one.share_until_first_difference) for one in found])
            axes.set(ylim=(0, 102), ylabel="% of the answer until the first difference")


def compare(candidate: Candidate, wanted: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> Agreement:
    """The agreement of some answers with those wanted, prompt by prompt."""
    pairs = list(zip(wanted, got, strict=True))
    first = [_first_difference(want, have) for want, have in pairs]
    return Agreement(
        label=candidate.label,
        given=candidate.given,
        budget=candidate.budget,
        until_first_difference=fmean(first),
        share_until_first_difference=fmean(same / len(want) for same, want in zip(first, wanted, strict=True)),
        equal_tokens=fmean(sum(map(int.__eq__, want, have)) / len(want) for want, have in pairs),
        equal_answers=fmean(list(want) == list(have) for want, have in pairs),
        by_prompt=first,
    )


def _first_difference(want: Sequence[int], have: Sequence[int]) -> int:
    """Tokens before it; all that were wanted if there is none."""
    pairs = zip(want, have, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(want), len(have)))


def read_prompts(path: str, tokenizer: Tokenizer) -> list[list[int]]:
    """A JSONL file's prompts as token ids: a text as a user's message in the model's chat template, if it has one.

    Raises ConfigError, or InvalidRequestError where the template refuses a conversation.
    """
    try:
        contents = parse_jsonl(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: {getattr(error, 'strerror', None) or error}") from None
    template = load_template(None, tokenizer)
    return [_prompt(content, template, tokenizer) for content in contents]


def _prompt(content: Any, template: ChatTemplate | None, tokenizer: Tokenizer) -> list[int]:
    if isinstance(content, str):
        if template is None:
            return tokenizer.encode(content)
        content = [{"role": "user", "content": content}]
    elif all(isinstance(token, int) for token in content):
        return list(content)
    if template is None:
        raise ConfigError("--prompts: a conversation needs a chat template, which the model has not")
    return tokenizer.encode(template.render(content), add_special_tokens=False)
