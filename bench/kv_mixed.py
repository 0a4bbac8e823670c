"""What one request under a KV policy costs the plain requests that share its steps, beside one more plain request."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

from bench import output
from bench.policy_list import Candidate
from bench.progress import progress
from bench.steady import MIB, Decoding, Group, Step, Subject, check_context, whole_cycles
from engine.kv_policies.full import Full
from engine.kv_policies.policy import KVPolicy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Times:
    """A batch's steps, in milliseconds."""

    p50_ms: float
    mean_ms: float
    over_plain_ms: float | None
    """By how much they are longer than those with one more plain request, each beside the one that was timed with it:
    the median difference,"""
    mean_over_plain_ms: float | None
    """and the mean. None of the batch that has no further request."""
    kv_mib: float
    """Keys and values that a step attends to."""


@dataclass(frozen=True, slots=True)
class BatchTime:
    """A batch's."""

    label: str
    times: Times | None
    not_possible: str | None


@dataclass(frozen=True)
class Mixed:
    """The measurement: plain requests alone, with one more, and with one under each policy; steps in turns."""

    subject: Subject
    policies: Sequence[Candidate]
    plain: int
    context: int
    steps: int

    @classmethod
    def of(cls, args: argparse.Namespace, subject: Subject, policies: Sequence[Candidate]) -> "Mixed":
        """What the flags say. Raises ConfigError."""
        steps = whole_cycles(args.steps, [one.policy for one in policies])
        check_context("--mixed-context", args.mixed_context, steps)
        return cls(subject, policies, args.plain, args.mixed_context, steps)

    @property
    def title(self) -> str:
        """What is timed."""
        return f"A decode step of {self.plain} plain requests and another, context {self.context:,}"

    def each(self) -> Iterator[BatchTime]:
        """All batches, once every step is timed."""
        plain: tuple[KVPolicy, ...] = (Full(),) * self.plain
        others = [one for one in self.policies if not isinstance(one.policy, Full)]
        batches = {f"{self.plain} plain": plain, "+ 1 plain": (*plain, Full())}
        batches |= {f"+ 1 {one.label}": (*plain, one.policy) for one in others}
        groups = [Group(policies, self.context, self.steps) for policies in batches.values()]
        refusal = next((reason for group in groups if (reason := group.refusal(self.subject)) is not None), None)
        turns = self._turns(groups) if refusal is None else []
        for index, label in enumerate(batches):
            yield BatchTime(label, _times(turns, index) if turns else None, refusal)

    def _turns(self, groups: Sequence[Group]) -> list[list[Step]]:
        """One step of each group after the other, again and again: what the machine does meanwhile hits them alike."""
        cache = self.subject.cache(max(group.num_blocks(self.subject) for group in groups))
        decodings = [Decoding(self.subject, cache, group) for group in groups]
        turns = []
        with progress(self.title, groups[0].steps, "turn") as bar:
            for _ in range(groups[0].steps):
                turns.append([decoding.step() for decoding in decodings])
                bar.update()
        return turns

    def table(self, found: Sequence[BatchTime]) -> str:
        """A row per batch."""
        head = ["batch", "step, ms\np50", "\nmean", "KV read,\nMiB", "over + 1 plain,\nms, p50", "\nmean"]
        rows = []
        for one in found:
            if one.times is None:
                rows.append([one.label, "not possible", *["-"] * 4])
                continue
            times, over = one.times, (one.times.over_plain_ms, one.times.mean_over_plain_ms)
            differences = ["-" if value is None else f"{value:+.2f}" for value in over]
            rows.append([one.label, *map(output.figure, (times.p50_ms, times.mean_ms, times.kv_mib)), *differences])
        reasons = {one.not_possible for one in found if one.not_possible}
        return output.annotated(output.table(head, rows), [f"not possible: {reason}" for reason in reasons])

    def draw(self, axes: "Axes", found: Sequence[BatchTime]) -> None:
        """A bar per batch."""
        from bench.figures import BLUE

        shown = [(one.label, one.times.p50_ms) for one in reversed(found) if one.times is not None]
        bars = axes.barh([output.stacked(label) for label, _ in shown], [median for _, median in shown], color=BLUE)
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.set(title=f"{self.plain} plain requests and another", xlabel="step, ms, p50")


def _times(turns: Sequence[Sequence[Step]], index: int) -> Times:
    """Of the batch of that index; the one with a further plain request is the second."""
    seconds = [turn[index].seconds for turn in turns]
    over = [turn[index].seconds - turn[1].seconds for turn in turns] if index else None
    return Times(
        median(seconds) * 1e3,
        fmean(seconds) * 1e3,
        None if over is None else median(over) * 1e3,
        None if over is None else fmean(over) * 1e3,
        fmean(turn[index].kv_bytes for turn in turns) / MIB,
    )
