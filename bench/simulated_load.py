"""The load that is simulated, from the command's flags: made up, a trace, or JSON lines."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import Final

from bench import flags
from bench.arrivals import OpenLoop, parse_rate
from bench.workload import MOST_REQUESTS, Lengths, SyntheticLoad, moved, parse_lengths, random_moments, read_jsonl
from engine.errors import ConfigError
from scheduler.cluster import Load
from scheduler.config import SchedulerConfig
from scheduler.recording import read_recording
from scheduler.trace import TraceError

_PER_REPLICA: Final = "/replica"


@dataclass(frozen=True, slots=True)
class SimulatedLoad:
    """What comes to a cluster."""

    of: Callable[[int], Load]
    """By the number of replicas, on which a rate per replica depends."""
    title: str
    size: int
    """Requests, at most."""
    prefixes: int | None
    """Different prefixes to route by; None where some requests have one and some have none."""
    recorded: SchedulerConfig | None = None
    """The scheduler that it was recorded on, where that is known."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    group = parser.add_argument_group("the load")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--rate", metavar="R", help=f"requests/s on average, for all replicas together; R{_PER_REPLICA}: for each"
    )
    kind.add_argument(
        "--load",
        metavar="FILE",
        help="recorded requests instead: a trace of `octavo serve --trace`, or lines of JSON with time (seconds), "
        "prompt_tokens and output_tokens",
    )
    group.add_argument(
        "--burstiness", type=float, default=1.0, help="gamma shape of the gaps; 1 is Poisson, below is burstier"
    )
    group.add_argument(
        "--duration", type=float, default=60.0, metavar="S", help="seconds of arrivals (default: %(default)g)"
    )
    lengths = "N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:MOST]"
    group.add_argument(
        "--input-len", default="256", metavar="LENGTHS", help=f"tokens of prompts: {lengths} (default: %(default)s)"
    )
    group.add_argument("--output-len", default="128", metavar="LENGTHS", help="of answers (default: %(default)s)")
    group.add_argument("--prefixes", type=int, default=0, metavar="N", help="shared beginnings of prompts (default: 0)")
    group.add_argument(
        "--prefix-len", type=int, default=512, metavar="N", help="tokens of each, before --input-len (default: 512)"
    )
    group.add_argument("--speed", type=float, default=1.0, metavar="X", help="play a recorded load X times as fast")
    group.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and routes (default: %(default)s)")


def load_of(args: argparse.Namespace, replicas: Sequence[int] | None) -> SimulatedLoad:
    """The load that the flags describe, for numbers of ``replicas`` that are known or not. Raises ConfigError."""
    if args.load is not None:
        return _recorded(args)
    if args.rate is None:
        raise ConfigError("say what comes: --rate R requests/s, or --load FILE")
    return _synthetic(args, replicas)


def _synthetic(args: argparse.Namespace, replicas: Sequence[int] | None) -> SimulatedLoad:
    each = args.rate.endswith(_PER_REPLICA)
    if each and replicas is None:
        raise ConfigError(f"--rate {args.rate} grows with the replicas, so it needs --replicas")
    level = _level(args.rate.removesuffix(_PER_REPLICA), args.burstiness)
    flags.at_least(args, 0.001, "duration")
    flags.at_least(args, 0, "prefixes")
    flags.at_least(args, 1, "prefix_len")
    inputs, outputs = parse_lengths(args.input_len, "--input-len"), parse_lengths(args.output_len, "--output-len")
    requests = level.rate * args.duration  # of all replicas, or of each
    size = ceil(requests * max(replicas)) if each and replicas else ceil(requests)
    if size > MOST_REQUESTS:
        raise ConfigError(f"--rate and --duration make {size:,} requests, more than {MOST_REQUESTS:,}")
    moments = random_moments(size, args.burstiness, str(args.seed))

    def load(number: int) -> Load:
        return SyntheticLoad(
            moments=moments[: ceil(requests * number)] if each else moments,
            rate=level.rate * (number if each else 1),
            inputs=inputs,
            outputs=outputs,
            prefixes=args.prefixes,
            prefix_tokens=args.prefix_len,
            seed=str(args.seed),
        )

    return SimulatedLoad(load, _synthetic_title(args, level, inputs, outputs), size, args.prefixes)


def _level(text: str, burstiness: float) -> OpenLoop:
    levels = parse_rate(text, burstiness)
    if len(levels) > 1:
        raise ConfigError(f"--rate takes one rate here, not {text!r}")
    return levels[0]


def _synthetic_title(args: argparse.Namespace, level: OpenLoop, inputs: Lengths, outputs: Lengths) -> str:
    each = " for each replica" if args.rate.endswith(_PER_REPLICA) else ""
    rhythm = "Poisson arrivals" if args.burstiness == 1 else f"arrivals of burstiness {args.burstiness:g}"
    shared = f" after one of {args.prefixes} prefixes of {args.prefix_len}" if args.prefixes else ""
    return (
        f"{level.rate:,g} requests/s{each} for {args.duration:g} s, {rhythm}; prompts of {inputs.text} tokens{shared}, "
        f"answers of {outputs.text}"
    )


def _recorded(args: argparse.Namespace) -> SimulatedLoad:
    path = Path(args.load)
    if not 0 < args.speed < inf:
        raise ConfigError(f"--speed must be a positive number, not {args.speed:g}")
    config = None
    if _is_trace(path):
        try:
            recording = read_recording(path)
        except TraceError as error:
            raise ConfigError(str(error)) from None
        arrivals, config = recording.arrivals, recording.config
    else:
        arrivals = read_jsonl(path)
    arrivals = moved(arrivals, speed=args.speed)
    title = f"{len(arrivals):,} requests of {path.name} over {arrivals[-1].time:.4g} s"
    if args.speed != 1:
        title += f", {args.speed:g} times as fast as recorded"
    found = {arrival.prefix for arrival in arrivals}
    prefixes = len(found - {None}) if None not in found or found == {None} else None
    return SimulatedLoad(lambda _: arrivals, title, len(arrivals), prefixes, config)


def _is_trace(path: Path) -> bool:
    """Whether a file begins like a trace; one that cannot be read does not."""
    try:
        with path.open("rb") as file:
            return file.read(256).lstrip().startswith(b'{"version":')
    except OSError:
        return False
