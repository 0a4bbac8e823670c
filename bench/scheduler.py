"""`octavo bench scheduler`: what the scheduler itself costs, without a model: time per step, and KV memory left empty.

Time is what `schedule()` and `update()` take for sequences that all decode, as they do in nearly every step of a busy
server; the objects of one lie in memory meanwhile, since a full garbage collection visits them all. Memory is what
block tables hold beyond their tokens' KV, in a simulated load of mixed lengths; PagedAttention's measure (Kwon et al.
2023, Fig. 2).
"""

import argparse
import gc
import math
import random
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from bench import flags, output
from bench.measure import percentile
from engine.errors import ConfigError
from scheduler.batch import ScheduledBatch
from scheduler.config import SchedulerConfig
from scheduler.request import Request, StopRule
from scheduler.scheduler import Scheduler

BLOCK_SIZE = 16
PAPERS_WASTE = 0.04
"""PagedAttention's figure: less than this share of the KV memory held no token's state."""
MOST_SIGMA = 2.0
"""Of log-normal lengths: with more, single requests would be longer than all others together."""

_TOKEN = 7
_WARM_STEPS = 2 * BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step in steady decoding, in microseconds."""

    running: int
    schedule_p50: float
    update_p50: float
    p50: float
    """Of the two together, as are ``p99`` and ``longest``."""
    p99: float
    longest: float
    collecting: float
    """Garbage collection, on average over the steps; part of the times above."""

    @property
    def ns_per_sequence(self) -> float:
        """The median's share of one sequence, nanoseconds."""
        return self.p50 * 1e3 / self.running


@dataclass(frozen=True, slots=True)
class Waste:
    """What a mixed load left empty, summed over its steps."""

    steps: int
    held_slots: int
    """Slots of the blocks that sequences held, and"""
    filled_slots: int
    """those of them with a token's KV."""
    preemptions: int

    @property
    def share(self) -> float:
        """Empty slots among those held, 0 to 1."""
        return 1 - self.filled_slots / self.held_slots


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    timing = parser.add_argument_group("time of a step")
    timing.add_argument(
        "--running", default="64,256,512,1024", metavar="N,N,...", help="sequences that decode (default: %(default)s)"
    )
    timing.add_argument("--context", type=int, default=512, help="mean tokens of each (default: %(default)s)")
    timing.add_argument("--steps", type=int, default=400, help="timed steps (default: %(default)s)")
    timing.add_argument(
        "--gc",
        choices=("on", "frozen", "off"),
        default="on",
        help="Python's garbage collector: on; frozen: told first to leave alone what a server has loaded; or off "
        "(default: %(default)s)",
    )
    memory = parser.add_argument_group("waste of memory")
    memory.add_argument("--requests", type=int, default=512, help="requests of the mixed load (default: %(default)s)")
    memory.add_argument(
        "--places", type=int, default=64, help="of which so many run at a time, at most (default: %(default)s)"
    )
    memory.add_argument("--input-len", type=int, default=161, help="mean prompt, tokens (default: %(default)s)")
    memory.add_argument(
        "--output-len",
        type=int,
        default=338,
        help="mean answer, tokens (default: %(default)s; as of ShareGPT, in the PagedAttention paper's Fig. 11)",
    )
    memory.add_argument(
        "--sigma", type=float, default=1.0, help="of the lengths' log-normal distribution (default: %(default)g)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of lengths and prompts (default: %(default)s)")
    output.add_arguments(parser, plot="the time of a step over the running sequences")


def run(args: argparse.Namespace) -> int:
    """Time the steps, then weigh the memory. Raises ConfigError for settings that cannot work."""
    flags.at_least(args, 1, "context", "steps", "requests", "places", "input_len", "output_len")
    if not 0 <= args.sigma <= MOST_SIGMA:
        raise ConfigError(f"--sigma must be between 0 and {MOST_SIGMA:g}, not {args.sigma:g}")
    sizes = flags.whole_numbers(args.running, "--running")
    output.check(args)
    from bench.progress import progress

    times = []
    with _heap_of_a_server(args.gc):
        for running in sizes:
            with progress(f"{running} running", args.steps, "step") as bar:
                times.append(time_steps(running, args.context, args.steps, args.seed, bar.update))
    with progress("mixed load", args.requests, "req") as bar:
        waste = simulate(mixed_load(args), args.places, bar.update)
    print("\n".join([f"{args.steps} steps of decoding, context about {args.context}", "", _table(times), ""]))
    print(_waste_line(waste, args))
    findings: dict[str, Any] = {
        "steps": [{**asdict(one), "ns_per_sequence": one.ns_per_sequence} for one in times],
        "growth_exponent": growth(times),
        "waste": {**asdict(waste), "share": waste.share, "papers_share": PAPERS_WASTE},
    }
    contents = output.document("scheduler", add_arguments, args, findings)
    output.save(args, contents, partial(_draw, times=times, context=args.context))
    return 0


@contextmanager
def _heap_of_a_server(collector: str) -> Iterator[None]:
    """Within the block the objects of `octavo serve` are there, and the garbage collector is set as said."""
    import engine.launch  # noqa: F401
    import server.app  # noqa: F401

    gc.collect()
    if collector == "frozen":
        gc.freeze()
    if collector == "off":
        gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


@contextmanager
def _collections() -> Iterator[list[float]]:
    """A list that fills with the seconds of every garbage collection within the block."""
    seconds: list[float] = []

    def note(phase: str, _: object) -> None:
        now = time.perf_counter()
        if phase == "start":
            seconds.append(-now)
        else:
            seconds[-1] += now

    gc.callbacks.append(note)
    try:
        yield seconds
    finally:
        gc.callbacks.remove(note)


def time_steps(running: int, context: int, steps: int, seed: int, on_step: Callable[[], object]) -> StepTime:
    """Bring ``running`` sequences to decoding, then time ``steps`` steps of them all."""
    scheduler = _decoding(running, context, steps, seed)
    took: list[tuple[float, float]] = []
    gc.collect()
    with _collections() as collections:
        for _ in range(steps):
            began = time.perf_counter()
            batch = scheduler.schedule(now=0.0)
            scheduled = time.perf_counter()
            tokens = _sampled(batch)
            sampled = time.perf_counter()
            scheduler.update(batch, tokens)
            took.append((scheduled - began, time.perf_counter() - sampled))
            on_step()
    return _step_time(running, took, sum(collections))


def _step_time(running: int, took: Sequence[tuple[float, float]], collecting: float) -> StepTime:
    """From the seconds of schedule() and update(), step by step, and of garbage collection in all."""
    both = sorted((schedule + update) * 1e6 for schedule, update in took)
    return StepTime(
        running=running,
        schedule_p50=percentile(sorted(schedule for schedule, _ in took), 50) * 1e6,
        update_p50=percentile(sorted(update for _, update in took), 50) * 1e6,
        p50=percentile(both, 50),
        p99=percentile(both, 99),
        longest=both[-1],
        collecting=collecting * 1e6 / len(took),
    )


def _decoding(running: int, context: int, steps: int, seed: int) -> Scheduler:
    """A scheduler whose sequences have their prompts behind them.

    Prompts differ in length, so that in a step some sequences fill a block and most do not.
    """
    source = random.Random(f"{seed}/{running}")
    longest = context + BLOCK_SIZE
    max_tokens = _WARM_STEPS + steps + running * longest  # more than the steps that it takes to get there
    blocks = running * -(-(longest + _WARM_STEPS + 2 * steps + running) // BLOCK_SIZE)
    config = SchedulerConfig(
        num_blocks=blocks + -(-(longest + max_tokens) // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_num_seqs=running,
        max_num_batched_tokens=max(8192, 2 * running),
    )
    scheduler = Scheduler(config)
    for index in range(running):
        prompt = _prompt(source, context + source.randrange(BLOCK_SIZE))
        scheduler.add(Request(str(index), prompt, StopRule(max_tokens=max_tokens)), now=0.0)
    decoding = 0
    while decoding < _WARM_STEPS:
        batch = scheduler.schedule(now=0.0)
        scheduler.update(batch, _sampled(batch))
        decoding += batch.num_tokens == len(batch.items) == running
    return scheduler


def mixed_load(args: argparse.Namespace) -> Iterator[Request]:
    """Requests of log-normal lengths, in random order."""
    source = random.Random(f"{args.seed}/mixed")
    for index in range(args.requests):
        prompt, answer = (_draw_length(mean, args.sigma, source) for mean in (args.input_len, args.output_len))
        yield Request(str(index), _prompt(source, prompt), StopRule(max_tokens=answer))


def _draw_length(mean: int, sigma: float, source: random.Random) -> int:
    return max(1, round(source.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))


def simulate(requests: Iterable[Request], places: int, on_finish: Callable[[int], object]) -> Waste:
    """Serve all requests, ``places`` at a time, and look at the memory after every step.

    There is room for the longest of them, and a token of each step for everybody: who holds blocks is in every step.
    """
    live = list(requests)
    slots = sum(sorted((request.max_num_tokens for request in live), reverse=True)[:places])
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=slots // BLOCK_SIZE + places,
            block_size=BLOCK_SIZE,
            max_num_seqs=places,
            max_num_batched_tokens=max(2048, places),
        )
    )
    for request in live:
        scheduler.add(request, now=0.0)
    steps = held = filled = 0
    while scheduler.has_work:
        batch = scheduler.schedule(now=0.0)
        scheduler.update(batch, _sampled(batch))
        unfinished = [item.sequence for item in batch.items if item.sequence.finish_reason is None]
        on_finish(len(batch.items) - len(unfinished))
        steps += 1
        held += scheduler.pool.num_used * BLOCK_SIZE
        filled += sum(sequence.num_computed_tokens for sequence in unfinished)
    return Waste(steps, held, filled, scheduler.counters.preemptions)


def _prompt(source: random.Random, length: int) -> "array[int]":
    """Random tokens: no prefix is shared."""
    return array("i", source.choices(range(1000, 30_000), k=length))


def _sampled(batch: ScheduledBatch) -> list[list[int]]:
    return [[_TOKEN] * item.num_samples for item in batch.items]


def growth(times: Sequence[StepTime]) -> float | None:
    """The exponent e of "time grows as sequences^e", between the smallest and the largest; 1 is linear."""
    first, last = min(times, key=lambda one: one.running), max(times, key=lambda one: one.running)
    if first.running == last.running:
        return None
    return math.log(last.p50 / first.p50) / math.log(last.running / first.running)


def _table(times: Sequence[StepTime]) -> str:
    head = ["running\nsequences", "schedule()\np50 µs", "update()\np50 µs", "both\np50 µs", "\np99 µs", "\nmax µs"]
    head += ["of it gc,\nmean µs", "p50 per\nsequence, ns"]
    rows = []
    for one in times:
        values = (one.schedule_p50, one.update_p50, one.p50, one.p99, one.longest, one.collecting, one.ns_per_sequence)
        rows.append([str(one.running), *(f"{value:,.0f}" for value in values)])
    exponent = growth(times)
    line = (
        "" if exponent is None else f"\n\nA step's time grows as the number of sequences to the power {exponent:.2f}."
    )
    return output.table(head, rows) + line


def _waste_line(waste: Waste, args: argparse.Namespace) -> str:
    return (
        f"Mixed load: {args.requests} requests, {args.places} at a time, log-normal lengths, {args.input_len} and "
        f"{args.output_len} tokens on average;\n{waste.steps:,} steps, {waste.preemptions} preemptions. "
        f"{waste.share:.2%} of the slots in allocated blocks of {BLOCK_SIZE} held no token\n"
        f"(PagedAttention's figure: < {PAPERS_WASTE:.0%})."
    )


def _draw(path: str, times: Sequence[StepTime], context: int) -> None:
    from bench.figures import AMBER, BLUE, GREY, logarithmic, picture

    times = sorted(times, key=lambda one: one.running)
    sizes = [one.running for one in times]
    lines: Mapping[str, tuple[list[float], str]] = {
        "p99": ([one.p99 / 1e3 for one in times], AMBER),
        "median": ([one.p50 / 1e3 for one in times], BLUE),
    }
    title = f"One step of the scheduler: decoding, context about {context:,}"
    with picture(path, 1, title=title, width=7.5) as (axes,):
        for name, (values, color) in lines.items():
            axes.plot(sizes, values, "o-", color=color, linewidth=2, label=name)
        slope = times[0].p50 / times[0].running
        linear = [slope * size / 1e3 for size in sizes]
        axes.plot(sizes, linear, ":", color=GREY, label=f"linear: {slope:.1f} µs per sequence")
        axes.set(xlabel="running sequences", ylabel="schedule() + update(), ms", xscale="log", yscale="log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        logarithmic(axes.yaxis)
        axes.legend(loc="best")
