"""`octavo bench quality`: what KV policies cost in quality, measured on a text through the engine itself.

Four measurements, of which a call makes one: perplexity over windows of the text; over one long stream; how far greedy
answers stay those of the full cache; and whether a number told in a long text is found again.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from bench import flags, output
from engine.errors import ConfigError

if TYPE_CHECKING:
    from bench.policy_list import Candidate
    from engine.config import EngineConfig
    from engine.engine_info import EngineInfo

DEFAULT_POLICIES = ("full", "window:window=*", "streaming:sinks=4,window=*-4")


class Measurement(Protocol):
    """One of the four, ready to begin."""

    @property
    def info(self) -> "EngineInfo":
        """The engine's, by which it may refuse a policy."""

    @property
    def heading(self) -> str:
        """What is measured on what, in a line."""

    def each(self, candidates: "Sequence[Candidate]") -> Iterator[Any]:
        """Measure one policy after the other; what is found are dataclasses."""

    def table(self, found: Sequence[Any]) -> str:
        """It as text,"""

    def draw(self, path: str, found: Sequence[Any]) -> None:
        """and as a picture. Raises OSError or ValueError."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--text", metavar="FILE", help="the text, in UTF-8")
    policies = parser.add_argument_group("policies")
    policies.add_argument(
        "--policy",
        action="append",
        metavar="POLICY",
        help="a KV policy to measure; may be given several times. Its name, JSON as in --kv-policy of the server, or "
        "NAME:FIELD=VALUE,...; in place of a value *, *-N or */N stand for each of --budgets "
        f"(default: {' '.join(DEFAULT_POLICIES)})",
    )
    policies.add_argument(
        "--budgets",
        default="64,128,256,512",
        metavar="N,N,...",
        help="tokens that a policy with a * keeps (%(default)s)",
    )
    _add_measurements(parser)
    texts = parser.add_argument_group("texts")
    texts.add_argument("--window", type=int, default=768, help="tokens of a piece of the text (default: %(default)s)")
    texts.add_argument("--segments", type=int, default=8, help="pieces, or prompts (default: %(default)s)")
    texts.add_argument(
        "--skip", type=int, default=300, help="predictions at a window's beginning that do not count (%(default)s)"
    )
    texts.add_argument(
        "--prompts", metavar="FILE", help="of --generate: a JSONL file of prompts; the pieces of --text by default"
    )
    texts.add_argument("--seed", type=int, default=0, help="of the needles (default: %(default)s)")
    _add_engine(parser)
    output.add_arguments(parser, plot="what was measured against the tokens kept; a stream, against the position")


def _add_measurements(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is measured, instead of perplexity over windows")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--stream", type=int, metavar="N", help="perplexity by position over one stream of N tokens")
    one.add_argument("--generate", type=int, metavar="N", help="greedy answers of N tokens beside the full cache's")
    one.add_argument("--needle", type=int, metavar="N", help="N numbers told in a piece of text, and asked for")
    group.add_argument(
        "--full-up-to",
        type=int,
        default=16384,
        metavar="N",
        help="tokens of a stream after which policies that keep all stop: their cost is quadratic (%(default)s)",
    )
    group.add_argument(
        "--bucket", type=int, default=1024, metavar="N", help="positions that make a point of a stream (%(default)s)"
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--model", default="embedded", help="what to load (default: %(default)s)")
    group.add_argument("--dtype", default="auto", help="of weights and activations (default: %(default)s)")
    group.add_argument("--quantization", default="auto", help="none dequantizes a GGUF file (default: %(default)s)")
    group.add_argument("--kv-cache-dtype", default="auto", help="how KV is stored (default: as --dtype)")
    group.add_argument("--block-size", type=int, default=16, help="tokens in a KV block (default: %(default)s)")
    group.add_argument("--chunk", type=int, default=512, help="tokens computed in a step (default: %(default)s)")
    group.add_argument(
        "--prompt-len",
        type=int,
        metavar="N",
        help="tokens of a window or stream that come at once, as a prompt does, before the others come one by one, as "
        "an answer does; by default all where that gives the same, else --skip",
    )


def run(args: argparse.Namespace) -> int:
    """Measure each policy. Returns 0, or 130 if the user stopped it. Raises ConfigError for what cannot work."""
    flags.at_least(args, 1, "segments", "chunk", "generate", "needle", "prompt_len")
    flags.at_least(args, 0, "skip")
    flags.at_least(args, 2, "window", "stream", "full_up_to", "bucket")
    if args.prompts and not args.generate:
        raise ConfigError("--prompts is for --generate")
    if not (args.text or args.prompts):
        raise ConfigError("--text is missing: the file to measure on")
    output.check(args)
    from bench.policy_list import candidates, check
    from engine.config import EngineConfig, load

    budgets = flags.whole_numbers(args.budgets, "--budgets")
    policies = candidates(args.policy or DEFAULT_POLICIES, budgets)
    given = {name: getattr(args, name) for name in ("model", "dtype", "quantization", "kv_cache_dtype", "block_size")}
    config = load(EngineConfig, {**given, "max_num_batched_tokens": args.chunk})
    measurement = _measurement(args, config)
    check(policies, measurement.info)
    found: list[Any] = []
    interrupted = False
    try:
        found.extend(measurement.each(policies))
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; the figures are of the policies that had been measured by then", file=sys.stderr)
    if found:
        _report(args, measurement, found, interrupted)
    return output.INTERRUPTED if interrupted else 0


def _measurement(args: argparse.Namespace, config: "EngineConfig") -> Measurement:
    """The one that was asked for."""
    if args.stream:
        from bench.stream import Stream

        return Stream.of(args, config)
    if args.generate:
        from bench.agreement import Generation

        return Generation.of(args, config)
    if args.needle:
        from bench.needle import Needles

        return Needles.of(args, config)
    from bench.perplexity import Windows

    return Windows.of(args, config)


def _report(args: argparse.Namespace, measurement: Measurement, found: Sequence[Any], interrupted: bool) -> None:
    print(f"{measurement.heading}\n\n{measurement.table(found)}")
    findings = {
        "interrupted": interrupted,
        "heading": measurement.heading,
        "policies": [asdict(one) for one in found],
    }
    contents = output.document("quality", add_arguments, args, findings, files=("text", "prompts"))
    output.save(args, contents, lambda path: measurement.draw(path, found))
