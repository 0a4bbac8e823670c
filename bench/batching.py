"""`octavo bench batching`: what it is worth to let requests join and leave a batch between two steps.

One load, the same to the last token, is served in each of the batching modes. Its answers differ much in length, as
real ones do: a static batch runs as long as its longest answer does, with the places of the others empty. (Orca, Yu
et al. 2022, §3, names this early-finished and late-joining requests.)
"""

import argparse
import heapq
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bench import flags, local_server, output
from bench.arrivals import ClosedLoop, Level, parse_rate
from bench.extras import require
from bench.measure import Run, Stats, Summary, cautions, samples_ms, summarize
from bench.prompts import DEFAULT_VOCAB_SIZE, FIRST_RANDOM_ID, Prompt
from engine.errors import ConfigError

if TYPE_CHECKING:
    from bench.batching_run import Work

MODES = ("none", "static", "dynamic", "continuous")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, resolved and checked."""

    modes: tuple[str, ...]
    level: Level
    batch_size: int
    batch_delay: float
    places: int
    """Sequences that continuous batching may run at a time."""
    num_requests: int
    input_len: int
    output_len: int
    lengths: str
    repeats: int
    seed: int

    def prompts(self, repeat: int) -> list[Prompt]:
        """The requests of one repeat: the same for every mode."""
        return self._draw(f"{self.seed}/{repeat}", self.num_requests)

    def warmup(self) -> list[Prompt]:
        """A whole batch, since static batching would not begin with less."""
        return self._draw(f"{self.seed}/warmup", self.batch_size)

    def _draw(self, key: str, count: int) -> list[Prompt]:
        source = random.Random(key)
        ids = range(FIRST_RANDOM_ID, DEFAULT_VOCAB_SIZE)
        return [
            Prompt(source.choices(ids, k=self.input_len), draw_length(self.lengths, self.output_len, source))
            for _ in range(count)
        ]

    def answers(self) -> list[list[int]]:
        """The lengths of the answers, by repeat, in the order of their requests."""
        return [[prompt.output_len for prompt in self.prompts(repeat)] for repeat in range(self.repeats)]

    def serve_flags(self, mode: str) -> list[str]:
        """What `octavo serve` is told for a mode; the memory and the token budget are the same in all."""
        places = self.places if mode == "continuous" else self.batch_size
        told = ["--batching", mode, "--max-num-seqs", str(places), "--no-prefix-caching"]
        if mode in ("static", "dynamic"):
            told += ["--batch-size", str(self.batch_size)]
        if mode == "dynamic":
            told += ["--batch-delay", f"{self.batch_delay:g}"]
        return told

    def servers(self) -> Iterator[tuple[str, list[str]]]:
        """Mode and flags of every server, in turn: the modes inside, so that a machine's slow drift falls on all."""
        for _ in range(self.repeats):
            for mode in self.modes:
                yield mode, self.serve_flags(mode)

    @property
    def title(self) -> str:
        """The load in one line."""
        rhythm = f"{self.level.concurrency} in flight" if isinstance(self.level, ClosedLoop) else self.level.label
        lengths = [length for lengths in self.answers() for length in lengths]
        return (
            f"{self.num_requests} requests of {self.input_len} tokens, {rhythm}; answers of {min(lengths)} to "
            f"{max(lengths)} tokens, {sum(lengths) / len(lengths):.0f} on average; batches of {self.batch_size}"
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """One mode under the load, all its repeats."""

    runs: Sequence[Run]
    summary: Summary
    steps: int
    tokens_per_step: float
    """Tokens generated in a step, on average: how many sequences were in it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    modes = parser.add_argument_group("batching")
    modes.add_argument(
        "--modes", default=",".join(MODES), metavar="MODE,...", help="what to compare (default: %(default)s)"
    )
    modes.add_argument("--batch-size", type=int, default=8, help="requests in a full batch (default: %(default)s)")
    modes.add_argument(
        "--batch-delay",
        type=float,
        default=0.05,
        metavar="S",
        help="seconds that dynamic batching waits for a fuller batch (default: %(default)g)",
    )
    modes.add_argument(
        "--max-num-seqs",
        type=int,
        metavar="N",
        help="sequences that continuous batching may run at a time (default: --batch-size, so that the modes differ "
        "only in when a request may enter)",
    )
    _add_load_arguments(parser.add_argument_group("load"))
    local_server.add_arguments(parser)
    output.add_arguments(parser, plot="throughput by mode, and the distributions of TTFT and latency")


def _add_load_arguments(group: argparse._ArgumentGroup) -> None:
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="closed loop: requests in flight, at least the batch size (default: twice the most that run at a time, so "
        "that somebody always waits)",
    )
    kind.add_argument("--rate", metavar="R", help="open loop instead: Poisson arrivals, requests/s; for latency")
    group.add_argument(
        "--num-requests", type=int, metavar="N", help="a multiple of the batch size (default: 12 batches)"
    )
    group.add_argument("--input-len", type=int, default=128, help="tokens of each prompt (default: %(default)s)")
    group.add_argument("--output-len", type=int, default=64, help="mean tokens of an answer (default: %(default)s)")
    group.add_argument(
        "--lengths",
        choices=("exponential", "uniform"),
        default="exponential",
        help="how answers' lengths are distributed; exponential ones are cut at 8 times the mean, uniform ones lie "
        "between 1 and twice the mean (default: %(default)s)",
    )
    group.add_argument("--repeats", type=int, default=1, help="times that every mode is measured (default: 1)")
    group.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrivals (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure every mode on a server of its own. Returns 0; 1 if a request failed; 130 if the user stopped it.

    Raises ConfigError for a load that cannot work, OctavoError when a server cannot be started.
    """
    plan = make_plan(args)
    require("aiohttp")
    output.check(args)
    from bench import loop
    from bench.batching_run import measure
    from bench.client import Server

    repeats = dict.fromkeys(plan.modes, 0)

    def measure_next(mode: str, url: str) -> "tuple[Run, Work]":
        found = loop.run(measure(plan, mode, repeats[mode], Server(url, timeout=args.timeout)))
        repeats[mode] += 1
        return found

    found, interrupted = local_server.measure_each(args, plan.servers(), measure_next)
    measured = pool(found)
    if measured:
        _report(args, plan, measured, interrupted)
    if interrupted:
        return output.INTERRUPTED
    return 1 if any(one.summary.failed for one in measured.values()) else 0


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the flags against one another. Raises ConfigError, naming the flag at fault."""
    local_server.check(args)
    flags.at_least(args, 1, "batch_size", "input_len", "output_len", "repeats")
    flags.at_least(args, 0, "batch_delay")
    size = args.batch_size
    flags.at_least(args, size, "max_num_seqs")
    num_requests = 12 * size if args.num_requests is None else args.num_requests
    if num_requests < 1 or num_requests % size:
        raise ConfigError(
            f"--num-requests must be a multiple of the batch size, {size}, not {num_requests}: "
            "static batching would wait for ever to fill the last batch"
        )
    places = args.max_num_seqs or size
    return Plan(
        modes=_modes(args.modes),
        level=_level(args, places),
        batch_size=size,
        batch_delay=args.batch_delay,
        places=places,
        num_requests=num_requests,
        input_len=args.input_len,
        output_len=args.output_len,
        lengths=args.lengths,
        repeats=args.repeats,
        seed=args.seed,
    )


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(flags.items(text, "--modes"))
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"--modes takes {', '.join(MODES)}, not {mode!r}")
    return modes


def _level(args: argparse.Namespace, places: int) -> Level:
    if args.rate is not None:
        levels = parse_rate(args.rate, burstiness=1.0)
        if len(levels) > 1:
            raise ConfigError(f"--rate takes one rate here, not {args.rate!r}")
        return levels[0]
    concurrency = 2 * places if args.concurrency is None else args.concurrency
    if concurrency < args.batch_size:
        raise ConfigError(
            f"--concurrency must be at least the batch size, {args.batch_size}, not {concurrency}: "
            "static batching would wait for ever for requests that are sent only after its answers"
        )
    return ClosedLoop(concurrency)


def draw_length(distribution: str, mean: int, source: random.Random) -> int:
    """An answer's length in tokens, at least 1."""
    if distribution == "uniform":
        return source.randint(1, max(1, 2 * mean - 1))
    return max(1, min(8 * mean, round(source.expovariate(1 / mean))))


def static_steps(lengths: Sequence[int], size: int) -> int:
    """Steps that static batches of ``size`` take, in order: each as many as its longest answer has tokens."""
    return sum(max(lengths[start : start + size]) for start in range(0, len(lengths), size))


def refilled_steps(lengths: Sequence[int], places: int) -> int:
    """Steps that it takes if each place goes to the next answer, in order, in the step after its last one ended.

    An answer takes as many steps as it has tokens: its prompt is computed within the first. It is the fewest that
    continuous batching can take, but for what another order of arrival changes.
    """
    free = [0] * places  # the step from which on each place is free
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def pool(found: "Sequence[tuple[str, tuple[Run, Work]]]") -> dict[str, Measured]:
    """Every mode's repeats taken together, in the order of the modes' first."""
    by_mode: dict[str, list[tuple[Run, Work]]] = {}
    for mode, one in found:
        by_mode.setdefault(mode, []).append(one)
    measured = {}
    for mode, pairs in by_mode.items():
        runs = [run for run, _ in pairs]
        steps, tokens = (sum(numbers) for numbers in zip(*(work for _, work in pairs), strict=True))
        measured[mode] = Measured(runs, summarize(runs), steps, tokens / steps if steps else 0.0)
    return measured


def _report(args: argparse.Namespace, plan: Plan, measured: Mapping[str, Measured], interrupted: bool) -> None:
    from bench.report import error_lines

    static = sum(static_steps(lengths, plan.batch_size) for lengths in plan.answers())
    fewest = sum(refilled_steps(lengths, plan.places) for lengths in plan.answers())
    print("\n".join([plan.title, "", _table(measured), "", *conclusions(plan, measured, static, fewest)]))
    for mode, one in measured.items():
        for caution in cautions(one.runs):
            print(f"note, {mode}: {caution}")
        for line in error_lines(one.runs):
            print(f"{mode}: {line}", file=sys.stderr)
    findings = {
        "interrupted": interrupted,
        "static_steps": static,
        "fewest_steps": fewest,
        "modes": [
            {**asdict(one.summary), "mode": mode, "steps": one.steps, "tokens_per_step": one.tokens_per_step}
            for mode, one in measured.items()
        ],
    }
    contents = output.document("batching", add_arguments, args, findings)
    output.save(args, contents, partial(_draw, measured=measured, title=plan.title))


def _table(by_mode: Mapping[str, Measured]) -> str:
    head = ["mode", "requests/s", "output\ntok/s", "times\nnone", "steps", "tokens\nper step"]
    head += [f"{name}\n{part} ms" for name in ("TTFT", "latency") for part in ("p50", "p99")]
    rows = []
    for mode, one in by_mode.items():
        ratio = _ratio(one, by_mode.get("none"))
        rates = [*map(output.figure, (one.summary.requests_per_s, one.summary.output_tokens_per_s, ratio))]
        times = [value for name in ("ttft", "latency") for value in _middle_and_tail(one.summary.ms[name])]
        row = [mode, *rates, f"{one.steps:,}", output.figure(one.tokens_per_step)]
        rows.append([*row, *map(output.figure, times)])
    return output.table(head, rows)


def _middle_and_tail(stats: Stats | None) -> tuple[float | None, float | None]:
    return (stats.p50, stats.p99) if stats else (None, None)


def _ratio(one: Measured, other: Measured | None) -> float | None:
    """How many times the other's output tokens per second."""
    if other is None or not other.summary.output_tokens_per_s:
        return None
    return one.summary.output_tokens_per_s / other.summary.output_tokens_per_s


def conclusions(plan: Plan, by_mode: Mapping[str, Measured], static_steps: int, fewest_steps: int) -> list[str]:
    """What continuous batching gained over static, beside the steps that it saved and those that it could save.

    Refilling alone cannot gain more than it saves steps: a fuller step takes no less time than an emptier one, and the
    prompts are the same work in both.
    """
    could = f"{static_steps:,} to {fewest_steps:,}, or {static_steps / fewest_steps:.2f} times fewer"
    continuous, static = by_mode.get("continuous"), by_mode.get("static")
    lines = [f"Refilling the places of static batches could lower the steps for these answers from {could}."]
    if continuous is None or static is None or not continuous.steps or len(continuous.runs) != len(static.runs):
        return lines
    if not isinstance(plan.level, ClosedLoop):
        return ["The rate of requests decides the throughput of every mode that keeps up: compare TTFT and latency."]
    gain, saved = _ratio(continuous, static), static.steps / continuous.steps
    did = f"{static.steps:,} to {continuous.steps:,}, or {saved:.2f} times fewer"
    lines.append(f"Continuous batching lowered them from {did}, and gave {output.figure(gain)} times the output tok/s.")
    if gain is not None and gain > 1.02 * saved:
        lines.append("That is more than fewer steps explain: something else differed, such as the machine's load.")
    return lines


def _draw(path: str, measured: Mapping[str, Measured], title: str) -> None:
    from bench.figures import AMBER, BLUE, GREEN, GREY, cumulative, picture

    palette = dict(zip(MODES, (GREY, AMBER, GREEN, BLUE), strict=True))
    colors = [palette[mode] for mode in measured]
    samples: dict[str, dict[str, Any]] = {
        mode: samples_ms(record for run in one.runs for record in run.records) for mode, one in measured.items()
    }
    with picture(path, 3, title=title) as (bars, ttft, latency):
        rates = [one.summary.output_tokens_per_s for one in measured.values()]
        drawn = bars.bar(list(measured), rates, color=colors, width=0.6)
        bars.bar_label(drawn, [f"{rate:,.1f}" for rate in rates], padding=2)
        bars.grid(visible=False, axis="x")
        bars.set(title="Throughput", ylabel="output tokens/s")
        for axes, name, heading in ((ttft, "ttft", "Time to first token"), (latency, "latency", "Latency")):
            cumulative(axes, {mode: values[name] for mode, values in samples.items()}, colors)
            axes.set(title=heading, xlabel="ms, logarithmic", ylabel="share of requests at or below")
        latency.legend(loc="best")
