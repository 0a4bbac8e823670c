"""`octavo bench batching`: what it is worth to let requests join and leave a batch between two steps.

One load, the same to the last token, is served in each of the batching modes. Its answers differ much in length, as
real ones do: a static batch runs as long as its longest answer does, with the places of the others empty. (Orca, Yu
et al. 2022, §3, names this early-finished and late-joining requests.)
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench import local_server, output
from bench.arrivals import ClosedLoop, Level, parse_rate
from bench.extras import require
from bench.measure import Run, Stats, Summary, cautions, samples_ms, summarize
from bench.prompts import DEFAULT_VOCAB_SIZE, FIRST_RANDOM_ID, Prompt
from engine.errors import ConfigError

INTERRUPTED = 130
MODES = ("none", "static", "dynamic", "continuous")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, resolved and checked."""

    modes: tuple[str, ...]
    level: Level
    batch_size: int
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

    @property
    def static_excess(self) -> float:
        """Decoding steps of static batches over those of batches that are always full, at least 1: what refilling
        could save at most.
        """
        loads = [[prompt.output_len for prompt in self.prompts(repeat)] for repeat in range(self.repeats)]
        steps = sum(static_steps(lengths, self.batch_size) for lengths in loads)
        return steps * self.batch_size / sum(map(sum, loads))

    @property
    def title(self) -> str:
        """The load in one line."""
        rhythm = f"{self.level.concurrency} in flight" if isinstance(self.level, ClosedLoop) else self.level.label
        return (
            f"{self.num_requests} requests of {self.input_len} tokens, {rhythm}; answers of {self.output_len} tokens "
            f"on average, {self.lengths}; batches of {self.batch_size}"
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """One mode under the load, all its repeats."""

    runs: Sequence[Run]
    occupancy: float
    """Sequences that got a token in a step, on average over the steps."""
    summary: Summary


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
        help="closed loop: requests in flight, at least the batch size (default: twice that, so that a batch waits "
        "whenever one ends)",
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
    group.add_argument("--timeout", type=float, default=600.0, help="seconds per request (default: %(default)g)")
    group.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrivals (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure every mode on a server of its own. Returns 0; 1 if a request failed; 130 if the user stopped it.

    Raises ConfigError for a load that cannot work, OctavoError when a server cannot be started.
    """
    plan = make_plan(args)
    server_flags = local_server.flags_of(args)
    require("aiohttp", *(["matplotlib"] if args.plot else []))
    from bench.batching_run import measure

    pools: dict[str, list[tuple[Run, float]]] = {mode: [] for mode in plan.modes}
    interrupted = False
    try:
        for repeat in range(plan.repeats):  # the modes inside, so that a machine's slow drift falls on all alike
            for mode in plan.modes:
                with local_server.local_server([*server_flags, *mode_flags(mode, args)], args.port) as url:
                    pools[mode].append(measure(plan, mode, repeat, url, args.timeout))
    except KeyboardInterrupt:
        interrupted = True
    measured = {mode: _measured(pool) for mode, pool in pools.items() if pool}
    if measured:
        _report(args, plan, measured, interrupted)
    if interrupted:
        return INTERRUPTED
    return 1 if any(one.summary.failed for one in measured.values()) else 0


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the flags against one another. Raises ConfigError, naming the flag at fault."""
    output.at_least(args, 1, "batch_size", "input_len", "output_len", "repeats")
    output.at_least(args, 0, "batch_delay")
    if not args.timeout > 0:
        raise ConfigError(f"--timeout must be positive, not {args.timeout:g}")
    size = args.batch_size
    num_requests = 12 * size if args.num_requests is None else args.num_requests
    if num_requests < 1 or num_requests % size:
        raise ConfigError(
            f"--num-requests must be a multiple of the batch size, {size}, not {num_requests}: "
            "static batching would wait for ever to fill the last batch"
        )
    if args.max_num_seqs is not None and args.max_num_seqs < size:
        raise ConfigError(f"--max-num-seqs must be at least the batch size, {size}, not {args.max_num_seqs}")
    return Plan(
        _modes(args.modes),
        _level(args),
        size,
        num_requests,
        args.input_len,
        args.output_len,
        args.lengths,
        args.repeats,
        args.seed,
    )


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(mode.strip() for mode in text.split(",") if mode.strip())
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"--modes takes {', '.join(MODES)}, not {mode!r}")
    if not modes or len(set(modes)) < len(modes):
        raise ConfigError(f"--modes takes different modes with commas between them, not {text!r}")
    return modes


def _level(args: argparse.Namespace) -> Level:
    if args.rate is not None:
        levels = parse_rate(args.rate, burstiness=1.0)
        if len(levels) > 1:
            raise ConfigError(f"--rate takes one rate here, not {args.rate!r}")
        return levels[0]
    concurrency = 2 * args.batch_size if args.concurrency is None else args.concurrency
    if concurrency < args.batch_size:
        raise ConfigError(
            f"--concurrency must be at least the batch size, {args.batch_size}, not {concurrency}: "
            "static batching would wait for ever for requests that are sent only after its answers"
        )
    return ClosedLoop(concurrency)


def mode_flags(mode: str, args: argparse.Namespace) -> list[str]:
    """What `octavo serve` is told for a mode; the memory and the token budget are the same in all."""
    places = args.max_num_seqs if mode == "continuous" and args.max_num_seqs else args.batch_size
    flags = ["--batching", mode, "--max-num-seqs", str(places), "--no-prefix-caching"]
    if mode in ("static", "dynamic"):
        flags += ["--batch-size", str(args.batch_size)]
    if mode == "dynamic":
        flags += ["--batch-delay", f"{args.batch_delay:g}"]
    return flags


def draw_length(distribution: str, mean: int, source: random.Random) -> int:
    """An answer's length in tokens, at least 1."""
    if distribution == "uniform":
        return source.randint(1, max(1, 2 * mean - 1))
    return max(1, min(8 * mean, round(source.expovariate(1 / mean))))


def static_steps(lengths: Sequence[int], size: int) -> int:
    """Decoding steps that static batches of ``size`` take, in order: each as many as its longest answer has tokens."""
    return sum(max(lengths[start : start + size]) for start in range(0, len(lengths), size))


def _measured(pool: Sequence[tuple[Run, float]]) -> Measured:
    runs = [run for run, _ in pool]
    return Measured(runs, sum(occupancy for _, occupancy in pool) / len(pool), summarize(runs))


def _report(args: argparse.Namespace, plan: Plan, measured: Mapping[str, Measured], interrupted: bool) -> None:
    from bench.report import error_lines

    print("\n".join([plan.title, "", _table(measured), "", *_conclusions(plan, measured)]))
    for mode, one in measured.items():
        for caution in cautions(one.runs):
            print(f"note, {mode}: {caution}")
        for line in error_lines(one.runs):
            print(f"{mode}: {line}", file=sys.stderr)
    if interrupted:
        print("interrupted; the figures are of the runs that had ended by then", file=sys.stderr)
    none = measured.get("none")
    findings = {
        "interrupted": interrupted,
        "static_excess": plan.static_excess,
        "modes": [
            {**asdict(one.summary), "mode": mode, "sequences_per_step": one.occupancy, "times_none": _ratio(one, none)}
            for mode, one in measured.items()
        ],
    }
    contents = output.document("batching", add_arguments, args, findings)
    output.save(args, contents, lambda path: _draw(path, measured, plan.title))


def _table(by_mode: Mapping[str, Measured]) -> str:
    head = ["mode", "requests/s", "output\ntok/s", "times\nnone", "sequences\nper step"]
    head += [f"{name}\n{part} ms" for name in ("TTFT", "latency") for part in ("p50", "p99")]
    rows = []
    for mode, one in by_mode.items():
        ratio = _ratio(one, by_mode.get("none"))
        rates = [one.summary.requests_per_s, one.summary.output_tokens_per_s, ratio, one.occupancy]
        times = [value for name in ("ttft", "latency") for value in _middle_and_tail(one.summary.ms[name])]
        rows.append([mode, *map(output.figure, [*rates, *times])])
    return output.table(head, rows)


def _middle_and_tail(stats: Stats | None) -> tuple[float | None, float | None]:
    return (stats.p50, stats.p99) if stats else (None, None)


def _ratio(one: Measured, other: Measured | None) -> float | None:
    """How many times the other's output tokens per second."""
    if other is None or not other.summary.output_tokens_per_s:
        return None
    return one.summary.output_tokens_per_s / other.summary.output_tokens_per_s


def _conclusions(plan: Plan, by_mode: Mapping[str, Measured]) -> list[str]:
    lines = []
    if "continuous" in by_mode and "static" in by_mode:
        ratio = _ratio(by_mode["continuous"], by_mode["static"])
        lines.append(f"Continuous batching gives {output.figure(ratio)} times the output tok/s of static.")
    lines.append(f"Static batches take {plan.static_excess:.2f} times the steps of batches that are always full.")
    return lines


def _draw(path: str, by_mode: Mapping[str, Measured], title: str) -> None:
    from bench.figures import AMBER, BLUE, GREEN, GREY, cumulative, picture

    palette = dict(zip(MODES, (GREY, AMBER, GREEN, BLUE), strict=True))
    colors = [palette[mode] for mode in by_mode]
    samples: dict[str, dict[str, Any]] = {
        mode: samples_ms(record for run in one.runs for record in run.records) for mode, one in by_mode.items()
    }
    with picture(path, 3, title=title) as (bars, ttft, latency):
        rates = [one.summary.output_tokens_per_s for one in by_mode.values()]
        drawn = bars.bar(list(by_mode), rates, color=colors, width=0.6)
        bars.bar_label(drawn, [f"{rate:.0f}" for rate in rates], padding=2)
        bars.grid(visible=False, axis="x")
        bars.set(title="Throughput", ylabel="output tokens/s")
        for axes, name, heading in ((ttft, "ttft", "Time to first token"), (latency, "latency", "Latency")):
            cumulative(axes, {mode: values[name] for mode, values in samples.items()}, colors)
            axes.set(title=heading, xlabel="ms, logarithmic", ylabel="share of requests at or below")
        latency.legend(loc="upper left")
