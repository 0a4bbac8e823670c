"""One long stream under each KV policy: perplexity and KV blocks by position, far past the trained length.

(StreamingLLM, Xiao et al. 2024, Figs. 3 and 5.)
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import PurePath

from bench import output
from bench.policy_list import Candidate
from bench.progress import progress
from bench.teacher_forcing import Scores, Steps, load, score
from bench.windows import cut
from engine.config import EngineConfig
from engine.engine_info import EngineInfo
from engine.kv_cache import KVCache
from engine.launch import LoadedModel


@dataclass(frozen=True, slots=True)
class Part:
    """The positions from ``start`` up to, not including, ``end``."""

    start: int
    end: int
    nll: float
    """Mean over its tokens of −ln p(token); the stream's first token is not predicted."""
    blocks: int
    """KV blocks held in any of the steps that predicted them, at most."""

    @property
    def tokens(self) -> int:
        """Those that were predicted."""
        return self.end - max(self.start, 1)


@dataclass(frozen=True, slots=True)
class StreamQuality:
    """One policy's."""

    label: str
    budget: int | None
    parts: list[Part]
    kv_bytes: int
    """Held in any step, at most."""

    def perplexity(self, start: int, end: int) -> float | None:
        """Of the parts from one position to another; None if the stream did not go that far."""
        parts = [part for part in self.parts if start <= part.start and part.end <= end]
        if not parts or parts[-1].end < end:
            return None
        return math.exp(sum(part.nll * part.tokens for part in parts) / sum(part.tokens for part in parts))


@dataclass(frozen=True)
class Stream:
    """The measurement: a text of many times the trained length, as one sequence."""

    loaded: LoadedModel
    info: EngineInfo
    text: Sequence[int]
    steps: Steps
    bucket: int
    full_up_to: int
    text_name: str

    @classmethod
    def of(cls, args: argparse.Namespace, config: EngineConfig) -> "Stream":
        """Load the model and read the text. Raises ConfigError."""
        loaded, info = load(config)
        (text,) = cut(args.text, loaded.checkpoint.tokenizer, 1, args.stream)
        steps = Steps.of(args, config, loaded)
        return cls(loaded, info, text, steps, args.bucket, args.full_up_to, PurePath(args.text).name)

    @property
    def heading(self) -> str:
        """What was measured on what."""
        return (
            f"{self.info.model_name}, {self.info.dtypes}, {self.text_name}: a stream of {len(self.text):,} tokens; "
            f"trained length {self.trained_length:,}"
        )

    @property
    def trained_length(self) -> int:
        """The model's own."""
        return self.loaded.decoder.config.max_position

    def each(self, candidates: Sequence[Candidate]) -> Iterator[StreamQuality]:
        """Measure one policy after the other; one that keeps all only as far as it was said to go."""
        loaded, steps = self.loaded, self.steps
        block_bytes = KVCache.block_bytes(loaded.decoder.config, steps.block_size, loaded.dtype, steps.kv_format)
        for candidate in candidates:
            text = self.text if candidate.budget is not None else self.text[: self.full_up_to]
            with progress(candidate.label, len(text), "tok") as bar:
                scores = score(self.loaded, candidate.policy, [text], self.steps, on_tokens=bar.update)
            most = max(blocks for _, blocks in scores.blocks)
            yield StreamQuality(candidate.label, candidate.budget, parts(scores, self.bucket), most * block_bytes)

    def table(self, found: Sequence[StreamQuality]) -> str:
        """A row per doubling of the position, a column per policy; then the memory."""
        ends = [self.bucket]
        while ends[-1] < len(self.text):
            ends.append(min(2 * ends[-1], len(self.text)))
        rows = [
            [f"{start:,} – {end:,}", *(output.figure(one.perplexity(start, end)) for one in found)]
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        blocks = ["KV blocks, at most", *(f"{max(part.blocks for part in one.parts):,}" for one in found)]
        memory = ["KV memory, at most, MiB", *(f"{one.kv_bytes / 2**20:,.1f}" for one in found)]
        head = ["perplexity of\npositions", *(one.label.replace(" ", "\n") for one in found)]
        return output.table(head, [*rows, blocks, memory])

    def draw(self, path: str, found: Sequence[StreamQuality]) -> None:
        """Perplexity and blocks over the position."""
        from bench.figures import COLORS, QUIET, logarithmic, picture

        with picture(path, 2, title="One long stream") as (left, right):
            for one, color in zip(found, cycle(COLORS), strict=False):
                ends = [part.end for part in one.parts]
                left.plot(ends, [math.exp(part.nll) for part in one.parts], color=color, linewidth=1.8, label=one.label)
                right.plot(ends, [part.blocks for part in one.parts], color=color, linewidth=1.8)
            for axes in (left, right):
                axes.set_xlabel("position")
                for axis in (axes.xaxis, axes.yaxis):
                    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
                if self.trained_length < len(self.text):
                    axes.axvline(self.trained_length, color=QUIET, linestyle=":", linewidth=1.5, label="trained length")
            left.set(yscale="log", ylabel="perplexity, logarithmic")
            logarithmic(left.yaxis)
            left.legend()
            right.set(ylim=(0, None), ylabel="KV blocks held")


def parts(scores: Scores, bucket: int) -> list[Part]:
    """A single text's scores by stretches of ``bucket`` positions, at least 2; the last perhaps shorter."""
    (nll,) = scores.nll.double()
    steps = list(zip([0, *(done for done, _ in scores.blocks)], scores.blocks, strict=False))
    found = []
    for start in range(0, len(nll), bucket):
        end = min(start + bucket, len(nll))
        # A step that computes the tokens from `begin` up to `done` predicts those one further.
        held = max(blocks for begin, (done, blocks) in steps if begin + 1 < end and done >= start)
        found.append(Part(start, end, float(nll[start:end].nanmean()), held))
    return found
