"""How many requests run at once in the same memory, by KV policy: the scheduler's own decisions, without a model."""

import argparse
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench import output
from bench.policy_list import Candidate
from bench.progress import progress
from bench.steady import MIB, TOKEN, Subject
from engine.errors import ConfigError
from engine.request_checks import is_endless
from engine.setting_values import memory
from scheduler.config import SchedulerConfig
from scheduler.request import Request, StopRule
from scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Service:
    """How a scheduler served all requests."""

    peak: int
    """Sequences in a step, at most."""
    mean: float
    """On average over the steps."""
    steps: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Held:
    """A policy's."""

    label: str
    service: Service | None
    not_possible: str | None


@dataclass(frozen=True)
class Holding:
    """The measurement: the same requests in the same memory under each policy."""

    subject: Subject
    policies: Sequence[Candidate]
    memory_blocks: int
    requests: int
    input_len: int
    output_len: int
    chunk: int
    """Tokens computed in a step, at most."""

    title = "Requests held at equal memory"

    @classmethod
    def of(cls, args: argparse.Namespace, subject: Subject, policies: Sequence[Candidate]) -> "Holding":
        """What the flags say. Raises ConfigError."""
        try:
            blocks = memory(args.kv_cache_memory) // subject.block_bytes
        except ValueError as error:
            raise ConfigError(f"--kv-cache-memory: {error}") from None
        if blocks < 1:
            raise ConfigError(f"--kv-cache-memory: a block alone takes {subject.block_bytes:,} bytes")
        return cls(subject, policies, blocks, args.requests, args.input_len, args.output_len, args.chunk)

    def each(self) -> Iterator[Held]:
        """One policy after the other."""
        with progress(self.title, len(self.policies) * self.requests, "req") as bar:
            for one in self.policies:
                refusal = self._refusal(one)
                service = None if refusal is not None else self._serve(one)
                bar.update(self.requests)
                yield Held(one.label, service, refusal)

    def _config(self) -> SchedulerConfig:
        return SchedulerConfig(
            num_blocks=self.memory_blocks,
            block_size=self.subject.info.block_size,
            max_num_seqs=self.requests,
            max_num_batched_tokens=max(self.chunk, self.requests),
            prefix_caching=False,
        )

    def _refusal(self, one: Candidate) -> str | None:
        length, longest = self.input_len + self.output_len, self.subject.loaded.decoder.config.max_position
        if length > longest and not is_endless(one.policy):
            return f"the model's context length is {longest:,} tokens"
        return self._config().refusal(length, 1, self.subject.budget(one.policy))

    def _serve(self, one: Candidate) -> Service:
        scheduler, budget = Scheduler(self._config()), self.subject.budget(one.policy)
        for index in range(self.requests):
            prompt = array("i", [TOKEN]) * self.input_len
            scheduler.add(Request(str(index), prompt, StopRule(max_tokens=self.output_len), kv_budget=budget))
        running = []
        while scheduler.has_work:
            batch = scheduler.schedule()
            running.append(scheduler.num_running)
            scheduler.update(batch, [[TOKEN] * item.num_samples for item in batch.items])
        return Service(max(running), sum(running) / len(running), len(running), scheduler.counters.preemptions)

    def table(self, found: Sequence[Held]) -> str:
        """A row per policy."""
        size, mib = self.subject.info.block_size, self.memory_blocks * self.subject.block_bytes / MIB
        line = (
            f"{self.requests} requests of {self.input_len:,} + {self.output_len:,} tokens, all there from the start, "
            f"in {mib:,.0f} MiB: {self.memory_blocks:,} blocks of {size}"
        )
        head = ["policy", "run at once,\nat most", "\non average", "\nsteps", "\npreemptions"]
        rows, notes = [], []
        for one in found:
            if one.service is None:
                rows.append([one.label, "not possible", "-", "-", "-"])
                notes.append(f"{one.label}: not possible, {one.not_possible}")
            else:
                s = one.service
                rows.append([one.label, f"{s.peak}", f"{s.mean:.1f}", f"{s.steps:,}", f"{s.preemptions}"])
        return f"{line}\n\n{output.annotated(output.table(head, rows), notes)}"

    def draw(self, axes: "Axes", found: Sequence[Held]) -> None:
        """A bar per policy."""
        from bench.figures import BLUE

        shown = [(one.label, one.service.peak) for one in reversed(found) if one.service is not None]
        bars = axes.barh([output.stacked(label) for label, _ in shown], [peak for _, peak in shown], color=BLUE)
        axes.bar_label(bars, padding=3)
        axes.set(title=self.title, xlabel="sequences that run at once, at most")
