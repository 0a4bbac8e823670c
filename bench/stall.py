"""`octavo bench stall`: what running streams feel when a long prompt arrives, by the token budget of a step.

A step that computes a whole long prompt makes every running stream wait for it; under a smaller budget the prompt is
computed in chunks, and each stream gets a token between any two. (Chunked prefill: Sarathi-Serve, Agrawal et al. 2024.)
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from bench import flags, local_server, output
from bench.extras import require
from bench.measure import percentile
from bench.prompts import Lengths, RandomIds
from engine.errors import OctavoError

if TYPE_CHECKING:
    from bench.intrusion import Intrusion


@dataclass(frozen=True, slots=True)
class Stall:
    """What the streams felt, all repeats pooled. Times are in milliseconds."""

    steady_p50: float
    """ITL before the prompt came, as is the next."""
    steady_p99: float
    itl_p99: float
    """ITL from the prompt's sending to its first token, as is the next."""
    itl_max: float
    tokens: float
    """Tokens that each stream got in that time, on average."""
    ttft: float
    """The long prompt's time to first token, the median of the repeats."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    group = parser.add_argument_group("load")
    group.add_argument(
        "--budgets",
        default="256,512,2048,8192",
        metavar="N,N,...",
        help="values of --max-num-batched-tokens to compare; one above --prompt-len does not cut the prompt "
        "(default: %(default)s)",
    )
    group.add_argument("--prompt-len", type=int, default=6000, help="tokens of the long prompt (default: %(default)s)")
    group.add_argument("--streams", type=int, default=8, help="answers that are running (default: %(default)s)")
    group.add_argument(
        "--context", type=int, default=128, help="tokens of the running answers' prompts (default: %(default)s)"
    )
    group.add_argument(
        "--stream-len",
        type=int,
        default=1024,
        help="tokens that each stream asks for; it is cut off in the end (default: %(default)s)",
    )
    group.add_argument(
        "--quiet", type=float, default=1.0, metavar="S", help="seconds of steady decoding before (default: %(default)g)"
    )
    group.add_argument(
        "--repeats", type=int, default=3, help="long prompts, one after the other (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    local_server.add_arguments(parser, base_url="measure this one running server, as it is, instead of one per budget")
    output.add_arguments(parser, plot="the gaps between the streams' tokens over time, a panel per budget")


def run(args: argparse.Namespace) -> int:
    """Let the prompts arrive at each server. Returns 0, or 130 if the user stopped it.

    Raises ConfigError for settings that cannot work, OctavoError when a server fails.
    """
    local_server.check(args)
    flags.at_least(args, 1, "prompt_len", "streams", "context", "stream_len", "repeats")
    flags.at_least(args, 0.1, "quiet")
    budgets = flags.whole_numbers(args.budgets, "--budgets")
    require("aiohttp")
    output.check(args)
    from bench import intrusion, loop
    from bench.client import Server

    prompts = RandomIds(Lengths(args.prompt_len, 1)).draw(f"{args.seed}/prompts", 1 + args.repeats)
    running = RandomIds(Lengths(args.context, args.stream_len)).draw(f"{args.seed}/streams", args.streams)

    def intrude(label: str, url: str) -> "list[Intrusion]":
        server = Server(url, timeout=args.timeout)
        found = loop.run(intrusion.intrude_all(server, running, prompts, quiet=args.quiet, label=label))
        for one in found:  # what cannot be summarized is an error now, not after all the other servers
            summarize_stall([one], args.quiet)
        return found

    servers = [(f"{budget}", ["--max-num-batched-tokens", f"{budget}", "--no-prefix-caching"]) for budget in budgets]
    happened, interrupted = local_server.measure_each(args, servers, intrude)
    if happened:
        _report(args, dict(happened), interrupted)
    return output.INTERRUPTED if interrupted else 0


def summarize_stall(intrusions: "Sequence[Intrusion]", quiet: float) -> Stall:
    """Pool the repeats. Raises OctavoError when no stream got a token in one of the windows."""
    steady = sorted(gap.length * 1e3 for one in intrusions for gap in one.gaps(one.sent - quiet, one.sent))
    during = sorted(gap.length * 1e3 for one in intrusions for gap in one.gaps(one.sent, one.answered))
    if not steady or not during:
        raise OctavoError("no stream got a token meanwhile: the prompt is too short to stall any, or --quiet is")
    return Stall(
        steady_p50=percentile(steady, 50),
        steady_p99=percentile(steady, 99),
        itl_p99=percentile(during, 99),
        itl_max=during[-1],
        tokens=len(during) / sum(len(one.streams) for one in intrusions),
        ttft=percentile(sorted(one.ttft for one in intrusions), 50) * 1e3,
    )


def _report(args: argparse.Namespace, happened: "Mapping[str, Sequence[Intrusion]]", interrupted: bool) -> None:
    stalls = {label: summarize_stall(intrusions, args.quiet) for label, intrusions in happened.items()}
    title = f"A prompt of {args.prompt_len:,} tokens arrives at {args.streams} running streams"
    print(f"{title}; {args.repeats} times\n\n{_table(stalls)}")
    findings = {
        "interrupted": interrupted,
        "budgets": [
            {
                "label": label,
                **asdict(stalls[label]),
                "repeats": [asdict(summarize_stall([one], args.quiet)) for one in intrusions],
            }
            for label, intrusions in happened.items()
        ],
    }
    contents = output.document("stall", add_arguments, args, findings)
    output.save(args, contents, partial(_draw, happened=happened, quiet=args.quiet, title=title))


def _table(stalls: Mapping[str, Stall]) -> str:
    head = ["tokens\nper step", "ITL before:\np50 ms", "\np99 ms", "until answered:\np99 ms", "\nmax ms"]
    head += ["tokens per\nstream", "prompt's\nTTFT ms"]
    rows = []
    for label, stall in stalls.items():
        figures = (stall.steady_p50, stall.steady_p99, stall.itl_p99, stall.itl_max, stall.tokens, stall.ttft)
        rows.append([label, *map(output.figure, figures)])
    return output.table(head, rows)


def _draw(path: str, happened: "Mapping[str, Sequence[Intrusion]]", quiet: float, title: str) -> None:
    """The first repeat of each: a point per gap, where it ended."""
    from bench.figures import AMBER, BLUE, logarithmic, picture

    with picture(path, len(happened), title=f"{title}; shaded: until its first token", shared=True) as panels:
        for axes, (label, intrusions) in zip(panels, happened.items(), strict=True):
            one = intrusions[0]
            gaps = list(one.gaps(one.sent - quiet, one.answered + quiet / 2))
            axes.axvspan(0, one.ttft, color=AMBER, alpha=0.18, linewidth=0)
            axes.scatter([gap.end - one.sent for gap in gaps], [gap.length * 1e3 for gap in gaps], s=9, color=BLUE)
            heading = f"{int(label):,} tokens per step" if label.isdigit() else label
            axes.set(title=heading, xlabel="s since the prompt was sent")
            axes.set_yscale("log")
        panels[0].locator_params(axis="x", nbins=6)
        logarithmic(panels[0].yaxis)
        panels[0].set_ylabel("gap between two tokens of a stream, ms")
