"""StreamingLLM beside the sliding window whose KV is computed anew for every token (Xiao et al. 2024, §4.4, Fig. 10).

The latter is what a plain model needs to go on for ever with the same quality: its window's text is a prompt, of
which one token comes. The paper found StreamingLLM up to 22.2 times as fast.
"""

import argparse
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from bench import flags, output
from bench.progress import progress
from bench.steady import GREEDY, TOKEN, WARM_STEPS, Decoding, Group, Subject
from engine.errors import ConfigError
from engine.kv_cache import KVCache
from engine.kv_policies.fit import budget_refusal
from engine.kv_policies.streaming import Streaming
from engine.model_runner import ModelRunner
from engine.sampler import SampleRow
from scheduler.config import SchedulerConfig
from scheduler.request import Request, StopRule
from scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SINKS = Streaming().sinks


@dataclass(frozen=True, slots=True)
class Times:
    """Medians of a token's time, in milliseconds."""

    streaming_ms: float
    recompute_ms: float
    ratio: float
    """How many times as fast streaming is."""


@dataclass(frozen=True, slots=True)
class Recomputation:
    """Both ways at one size."""

    window: int
    """Tokens that are seen: sinks and window together, or the window that is recomputed."""
    times: Times | None
    not_possible: str | None


@dataclass(frozen=True)
class Recompute:
    """The measurement: both ways at each window size, in turns."""

    subject: Subject
    windows: Sequence[int]
    repeats: int
    steps: int
    chunk: int
    """Tokens of a prompt that a step computes, at most."""

    title = "A token of a stream, StreamingLLM against a window that is recomputed"

    @classmethod
    def of(cls, args: argparse.Namespace, subject: Subject) -> "Recompute":
        """What the flags say. Raises ConfigError."""
        windows = flags.whole_numbers(args.windows, "--windows")
        if min(windows) <= SINKS:
            raise ConfigError(f"--windows must be more than the {SINKS} sinks, not {min(windows)}")
        return cls(subject, windows, args.repeats, args.steps, args.chunk)

    def each(self) -> Iterator[Recomputation]:
        """One size after the other."""
        with progress(self.title, sum(self.windows) * self.repeats, "tok") as bar:
            for window in self.windows:
                policy = Streaming(sinks=SINKS, window=window - SINKS)
                group = Group((policy,), 2 * window + self.steps + WARM_STEPS, self.steps)
                refusal = self._refusal(window, policy) or group.refusal(self.subject)
                if refusal is not None:
                    yield Recomputation(window, None, refusal)
                    continue
                own = -(-(window + 1) // self.subject.info.block_size)
                cache = self.subject.cache(max(own, group.num_blocks(self.subject)))
                decoding = Decoding(self.subject, cache, group)
                streamed, recomputed = [], []
                for turn in range(self.repeats):
                    recomputed.append(self._recompute(window, cache))
                    bar.update(window)
                    share = range(self.steps * turn // self.repeats, self.steps * (turn + 1) // self.repeats)
                    streamed += [decoding.step().seconds for _ in share]
                fast, slow = median(streamed), median(recomputed)
                yield Recomputation(window, Times(fast * 1e3, slow * 1e3, slow / fast), None)

    def _refusal(self, window: int, policy: Streaming) -> str | None:
        info = self.subject.info
        if window >= info.max_model_len:
            return f"the model's context length is {info.max_model_len:,} tokens"
        return budget_refusal(policy.budget(), info)

    def _recompute(self, window: int, cache: KVCache) -> float:
        """Seconds from a prompt of ``window`` tokens to the one token that follows it."""
        prompt = array("i", [TOKEN]) * window
        began = time.perf_counter()
        scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=cache.num_blocks,
                block_size=cache.block_size,
                max_num_batched_tokens=self.chunk,
                prefix_caching=False,
            )
        )
        runner = ModelRunner(self.subject.loaded.decoder, cache)
        scheduler.add(Request("window", prompt, StopRule(max_tokens=1)))
        while scheduler.has_work:
            batch = scheduler.schedule()
            rows = [SampleRow(GREEDY, 0, prompt, window, frozenset()) for item in batch.items if item.num_samples]
            samples = runner.execute(batch, rows).samples
            scheduler.update(batch, [[sample.token for sample in group] for group in samples])
        return time.perf_counter() - began

    def table(self, found: Sequence[Recomputation]) -> str:
        """A row per size."""
        head = ["tokens seen", "streaming,\nms/token", "recomputation,\nms/token", "ratio"]
        rows, notes = [], []
        for one in found:
            if one.times is None:
                rows.append([f"{one.window:,}", "not possible", "-", "-"])
                notes.append(f"{one.window:,}: not possible, {one.not_possible}")
            else:
                figures = map(output.figure, (one.times.streaming_ms, one.times.recompute_ms))
                rows.append([f"{one.window:,}", *figures, f"{one.times.ratio:.1f}"])
        return output.annotated(output.table(head, rows), notes)

    def draw(self, axes: "Axes", found: Sequence[Recomputation]) -> None:
        """Both times over the size."""
        from bench.figures import AMBER, BLUE, logarithmic

        points = [(one.window, one.times) for one in found if one.times is not None]
        sizes = [window for window, _ in points]
        axes.plot(sizes, [times.recompute_ms for _, times in points], "o-", color=AMBER, label="recomputation")
        axes.plot(sizes, [times.streaming_ms for _, times in points], "o-", color=BLUE, label="streaming")
        axes.set(title="A token of a stream", xscale="log", yscale="log", xlabel="tokens seen", ylabel="ms per token")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        logarithmic(axes.yaxis)
        axes.legend()
