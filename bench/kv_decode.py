"""A decode step against the context behind it, by KV policy, beside the floor that memory bandwidth sets."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

from bench import flags, output
from bench.policy_list import Candidate
from bench.progress import progress
from bench.steady import MIB, Decoding, Group, Subject, check_context, whole_cycles
from engine.kv_cache import KVCache

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Timing:
    """Timed steps."""

    steps: int
    p50_ms: float
    mean_ms: float
    """Selecting is in the mean as often as it occurs; the median is a step without it where it is rare."""
    kv_mib: float
    """Keys and values that a step attends to."""
    floor_ms: float
    """The time to read those and the weights."""


@dataclass(frozen=True, slots=True)
class DecodeTime:
    """A policy at a context and a batch size."""

    label: str
    context: int
    batch: int
    timing: Timing | None
    not_possible: str | None
    """Why there is no timing."""


@dataclass(frozen=True)
class Decode:
    """The measurement: each policy at each context and batch size."""

    subject: Subject
    policies: Sequence[Candidate]
    contexts: Sequence[int]
    batches: Sequence[int]
    steps: int

    title = "A decode step, by the context behind it"

    @classmethod
    def of(cls, args: argparse.Namespace, subject: Subject, policies: Sequence[Candidate]) -> "Decode":
        """What the flags say. Raises ConfigError."""
        contexts = flags.whole_numbers(args.contexts, "--contexts")
        most = max(whole_cycles(args.steps, [one.policy]) for one in policies)
        check_context("--contexts", min(contexts), most)
        return cls(subject, policies, contexts, flags.whole_numbers(args.batch, "--batch"), args.steps)

    def each(self) -> Iterator[DecodeTime]:
        """One after the other."""
        cases = [(one, self._group(one, context, batch)) for one, context, batch in self._cases()]
        possible = [group for _, group in cases if group.refusal(self.subject) is None]
        cache = self.subject.cache(max((group.num_blocks(self.subject) for group in possible), default=1))
        with progress(self.title, sum(group.steps for group in possible), "step") as bar:
            for candidate, group in cases:
                refusal = group.refusal(self.subject)
                timing = None if refusal is not None else self._time(group, cache, bar.update)
                yield DecodeTime(candidate.label, group.context, len(group.policies), timing, refusal)

    def _time(self, group: Group, cache: KVCache, on_step: Callable[[], object]) -> Timing:
        decoding, steps = Decoding(self.subject, cache, group), []
        for _ in range(group.steps):
            steps.append(decoding.step())
            on_step()
        seconds = [step.seconds for step in steps]
        kv_bytes = fmean(step.kv_bytes for step in steps)
        floor = (self.subject.weight_bytes + kv_bytes) / self.subject.bandwidth
        return Timing(len(steps), median(seconds) * 1e3, fmean(seconds) * 1e3, kv_bytes / MIB, floor * 1e3)

    def _cases(self) -> Iterator[tuple[Candidate, int, int]]:
        for batch in self.batches:
            for context in self.contexts:
                for candidate in self.policies:
                    yield candidate, context, batch

    def _group(self, candidate: Candidate, context: int, batch: int) -> Group:
        policies = (candidate.policy,) * batch
        return Group(policies, context, whole_cycles(self.steps, policies))

    def table(self, found: Sequence[DecodeTime]) -> str:
        """A row per policy, context and batch size."""
        head = [
            "policy",
            "\nbatch",
            "\ncontext",
            "step, ms\np50",
            "\nmean",
            "KV read,\nMiB",
            "floor,\nms",
            "floor\nof p50",
        ]
        rows, notes = [], []
        for one in found:
            name = [one.label, f"{one.batch}", f"{one.context:,}"]
            if one.timing is None:
                rows.append([*name, "not possible", *["-"] * 4])
                notes.append(f"{one.label}, {one.batch} × {one.context:,}: not possible, {one.not_possible}")
                continue
            timing = one.timing
            figures = (timing.p50_ms, timing.mean_ms, timing.kv_mib, timing.floor_ms)
            rows.append([*name, *map(output.figure, figures), f"{timing.floor_ms / timing.p50_ms:.0%}"])
        return output.annotated(output.table(head, rows), notes)

    def draw(self, axes: "Axes", found: Sequence[DecodeTime]) -> None:
        """Mean over the context, a line per policy, of the largest batch."""
        from bench.figures import COLORS

        batch = max(one.batch for one in found)
        for candidate, color in zip(self.policies, COLORS * len(self.policies), strict=False):
            points = [
                (one.context, one.timing.mean_ms)
                for one in found
                if one.timing is not None and (one.batch, one.label) == (batch, candidate.label)
            ]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=candidate.label)
        contexts = sorted(set(self.contexts))
        axes.set(xscale="log", ylim=(0, None), xlabel="context, tokens", ylabel="mean step, ms")
        axes.set(title=f"{self.title}; batch of {batch}")
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.minorticks_off()
        axes.legend()
