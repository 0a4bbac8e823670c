"""`octavo bench kv`: what KV policies save in time and in memory, through the engine itself.

Four measurements: a decode step against the context behind it; StreamingLLM against a window that is recomputed for
every token; how many requests run at once in the same memory; and what a request under a policy costs the plain ones
beside it.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from bench import flags, output
from engine.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bench.policy_list import Candidate
    from bench.steady import Subject

DEFAULT_POLICIES = ("full", "streaming", "h2o", "tova")
PARTS = ("decode", "recompute", "held", "mixed")


class Part(Protocol):
    """One of the four, ready to begin."""

    @property
    def title(self) -> str:
        """What is measured, in a line."""

    def each(self) -> Iterator[Any]:
        """Measure; what is found are dataclasses, one by one."""

    def table(self, found: Sequence[Any]) -> str:
        """It as text,"""

    def draw(self, axes: "Axes", found: Sequence[Any]) -> None:
        """and as a picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument(
        "--part", default=",".join(PARTS), metavar="NAME,NAME,...", help="what to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--policy",
        action="append",
        metavar="POLICY",
        help="a KV policy: its name, JSON, or NAME:FIELD=VALUE,..., where a * stands for each of --budgets; may be "
        f"given several times (default: {', '.join(DEFAULT_POLICIES)})",
    )
    parser.add_argument("--budgets", default="256,1024", metavar="N,N,...", help="what a * is (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        default=32,
        help="timed steps of decoding, at least; where policies select, a whole number of selections, 2 or more "
        "(default: %(default)s)",
    )
    _add_parts(parser)
    group = parser.add_argument_group("engine")
    group.add_argument("--model", default="embedded", help="what to load (default: %(default)s)")
    group.add_argument("--dtype", default="auto", help="of weights and of what is computed (default: %(default)s)")
    group.add_argument("--kv-cache-dtype", default="auto", help="how KV is stored (default: as --dtype)")
    group.add_argument("--block-size", type=int, default=16, help="tokens in a KV block (default: %(default)s)")
    group.add_argument(
        "--chunk", type=int, default=2048, help="tokens that a step computes, of recompute and held (%(default)s)"
    )
    output.add_arguments(parser, plot="each part")


def _add_parts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decode: a step against the context behind it, which is random KV")
    group.add_argument(
        "--contexts", default="1024,2048,4096,8192,16384", metavar="N,N,...", help="tokens (default: %(default)s)"
    )
    group.add_argument("--batch", default="1,8", metavar="N,N,...", help="sequences in a step (default: %(default)s)")
    group = parser.add_argument_group("recompute: StreamingLLM against a sliding window that is recomputed")
    group.add_argument(
        "--windows", default="256,512,1024,2048", metavar="N,N,...", help="tokens seen (default: %(default)s)"
    )
    group.add_argument("--repeats", type=int, default=5, help="recomputed tokens of each size (default: %(default)s)")
    group = parser.add_argument_group("held: requests that run at once in the same memory")
    group.add_argument("--kv-cache-memory", default="1GiB", metavar="SIZE", help="of them all (default: %(default)s)")
    group.add_argument("--requests", type=int, default=256, help="how many (default: %(default)s)")
    group.add_argument("--input-len", type=int, default=4096, help="tokens of each prompt (default: %(default)s)")
    group.add_argument("--output-len", type=int, default=512, help="tokens of each answer (default: %(default)s)")
    group = parser.add_argument_group("mixed: plain requests in one batch with one under a policy")
    group.add_argument("--plain", type=int, default=8, help="plain requests (default: %(default)s)")
    group.add_argument("--mixed-context", type=int, default=1024, help="tokens of each (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure each part. Returns 0, or 130 if the user stopped it. Raises ConfigError for what cannot work."""
    flags.at_least(args, 1, "steps", "chunk", "repeats", "requests", "input_len", "output_len", "plain")
    chosen = flags.items(args.part, "--part")
    for name in chosen:
        if name not in PARTS:
            raise ConfigError(f"--part: there is no part {name!r}, but {', '.join(PARTS)}")
    budgets = flags.whole_numbers(args.budgets, "--budgets")
    output.check(args)
    from bench.policy_list import candidates, check
    from bench.steady import Subject
    from bench.step import read_bandwidth
    from bench.teacher_forcing import load
    from engine.config import EngineConfig
    from engine.config import load as configure
    from engine.kv_cache import pick_kv_format

    policies = candidates(args.policy or DEFAULT_POLICIES, budgets)
    given = {name: getattr(args, name) for name in ("model", "dtype", "kv_cache_dtype", "block_size")}
    loaded, engine = load(config := configure(EngineConfig, given))
    kv_format = pick_kv_format(config.kv_cache_dtype, loaded.decoder.config, loaded.dtype)
    subject = Subject(loaded, engine, read_bandwidth(), kv_format)
    check(policies, subject.info)
    parts = {name: _part(name, args, subject, policies) for name in chosen}
    info, speed = subject.info, subject.bandwidth / 1e9
    heading = f"{info.model_name}, {info.dtypes}, {info.threads} threads; memory is read at {speed:.1f} GB/s"
    print(heading)
    found: dict[str, list[Any]] = {}
    interrupted = False
    for name, part in parts.items():
        found[name] = []
        try:
            found[name].extend(part.each())
        except KeyboardInterrupt:
            interrupted = True
            print("interrupted; the figures are of what had been measured by then", file=sys.stderr)
        if found[name]:
            print(f"\n{part.title}\n\n{part.table(found[name])}")
        if interrupted:
            break
    _save(args, parts, found, {"interrupted": interrupted, "heading": heading, "bandwidth": subject.bandwidth})
    return output.INTERRUPTED if interrupted else 0


def _part(name: str, args: argparse.Namespace, subject: "Subject", policies: "Sequence[Candidate]") -> Part:
    """The part of that name. Raises ConfigError."""
    if name == "decode":
        from bench.kv_decode import Decode

        return Decode.of(args, subject, policies)
    if name == "recompute":
        from bench.kv_recompute import Recompute

        return Recompute.of(args, subject)
    if name == "held":
        from bench.kv_held import Holding

        return Holding.of(args, subject, policies)
    from bench.kv_mixed import Mixed

    return Mixed.of(args, subject, policies)


def _save(
    args: argparse.Namespace, parts: dict[str, Part], found: dict[str, list[Any]], findings: dict[str, Any]
) -> None:
    contents = output.document(
        "kv", add_arguments, args, {**findings, **{name: [asdict(one) for one in all_] for name, all_ in found.items()}}
    )

    def draw(path: str) -> None:
        from bench.figures import picture

        drawn = [name for name in parts if found.get(name)]
        with picture(path, len(drawn), title="KV policies: time and memory", width=6.5 * len(drawn)) as axes:
            for one, name in zip(axes, drawn, strict=True):
                parts[name].draw(one, found[name])

    output.save(args, contents, draw)
