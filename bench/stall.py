"""`octavo bench stall`: what running streams feel when a long prompt arrives, by the token budget of a step.

A step that computes a whole long prompt makes every running stream wait for it; under a smaller budget the prompt is
computed in chunks, and each stream gets a token between any two. (Chunked prefill: Sarathi-Serve, Agrawal et al. 2024.)
"""

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from bench import local_server, output
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
    """ITL before the prompt came."""
    itl_p50: float
    """ITL from the prompt's sending to its first token, as are the next two."""
    itl_p99: float
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
        "--stream-len", type=int, default=1024, help="tokens that each stream asks for; it is cut off in the end"
    )
    group.add_argument(
        "--quiet", type=float, default=1.0, metavar="S", help="seconds of steady decoding before (default: %(default)g)"
    )
    group.add_argument(
        "--repeats", type=int, default=3, help="long prompts, one after the other (default: %(default)s)"
    )
    group.add_argument("--timeout", type=float, default=600.0, help="seconds per request (default: %(default)g)")
    group.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    local_server.add_arguments(parser)
    parser.add_argument("--base-url", help="measure this one running server, as it is, instead of one per budget")
    output.add_arguments(parser, plot="the gaps between the streams' tokens over time, a panel per budget")


def run(args: argparse.Namespace) -> int:
    """Let the prompts arrive at each server. Returns 0, or 130 if the user stopped it.

    Raises ConfigError for settings that cannot work, OctavoError when a server fails.
    """
    output.at_least(args, 1, "prompt_len", "streams", "context", "stream_len", "repeats")
    output.at_least(args, 0.1, "quiet")
    budgets = output.whole_numbers(args.budgets, "--budgets")
    server_flags = [*local_server.flags_of(args), "--no-prefix-caching"]
    require("aiohttp", *(["matplotlib"] if args.plot else []))
    happened: dict[str, list[Intrusion]] = {}
    try:
        if args.base_url:
            happened[args.base_url] = _measure(args.base_url, args.base_url, args)
        for budget in [] if args.base_url else budgets:
            with local_server.local_server([*server_flags, "--max-num-batched-tokens", str(budget)], args.port) as url:
                happened[str(budget)] = _measure(str(budget), url, args)
    except KeyboardInterrupt:
        print("interrupted; the figures are of the servers that had been measured by then", file=sys.stderr)
        if happened:
            _report(args, happened)
        return 130
    _report(args, happened)
    return 0


def _measure(label: str, url: str, args: argparse.Namespace) -> "list[Intrusion]":
    """One intrusion per repeat."""
    from bench.client import Client, Server
    from bench.driving import warm_up
    from bench.intrusion import intrude
    from bench.load_test import event_loop_factory
    from bench.progress import progress

    server = Server(url, timeout=args.timeout)
    prompts = RandomIds(Lengths(args.prompt_len, 1)).draw(f"{args.seed}/prompts", 1 + args.repeats)
    running = RandomIds(Lengths(args.context, args.stream_len)).draw(f"{args.seed}/streams", args.streams)

    async def measure() -> "list[Intrusion]":
        found = []
        async with Client(server) as client:
            model = await client.model()
            await warm_up(client, prompts[:1], model)
            with progress(f"budget {label}", args.repeats, "prompt") as bar:
                for prompt in prompts[1:]:
                    found.append(await intrude(client, server, model, running, prompt, args.quiet))
                    bar.update()
        return found

    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        return runner.run(measure())


def summarize_stall(intrusions: "Sequence[Intrusion]", quiet: float) -> Stall:
    """Pool the repeats. Raises OctavoError when no stream got a token in one of the windows."""
    steady = sorted(gap.length for one in intrusions for gap in one.gaps(one.sent - quiet, one.sent))
    during = sorted(gap.length for one in intrusions for gap in one.gaps(one.sent, one.answered))
    if not steady or not during:
        raise OctavoError("no stream got a token meanwhile: the prompt is too short to stall any, or --quiet is")
    streams = sum(len(one.streams) for one in intrusions)
    p50, p99, longest = (percentile(during, percent) * 1e3 for percent in (50, 99, 100))
    ttft = percentile(sorted(one.ttft for one in intrusions), 50) * 1e3
    return Stall(percentile(steady, 50) * 1e3, p50, p99, longest, len(during) / streams, ttft)


def _report(args: argparse.Namespace, happened: "Mapping[str, Sequence[Intrusion]]") -> None:
    stalls = {label: summarize_stall(intrusions, args.quiet) for label, intrusions in happened.items()}
    title = f"A prompt of {args.prompt_len} tokens arrives at {args.streams} running streams"
    print(f"{title}; {args.repeats} times\n\n{_table(stalls)}")
    findings = {"budgets": [{"label": label, **asdict(stall)} for label, stall in stalls.items()]}
    contents = output.document("stall", add_arguments, args, findings)
    output.save(args, contents, lambda path: _draw(path, happened, args.quiet, title))


def _table(stalls: Mapping[str, Stall]) -> str:
    head = ["tokens\nper step", "ITL before\np50 ms", "meanwhile\np50 ms", "\np99 ms", "\nmax ms"]
    head += ["tokens per\nstream", "prompt's\nTTFT ms"]
    rows = []
    for label, stall in stalls.items():
        figures = (stall.steady_p50, stall.itl_p50, stall.itl_p99, stall.itl_max, stall.tokens, stall.ttft)
        rows.append([label, *map(output.figure, figures)])
    return output.table(head, rows)


def _draw(path: str, happened: "Mapping[str, Sequence[Intrusion]]", quiet: float, title: str) -> None:
    """The first repeat of each: a point per gap, where it ended."""
    from bench.figures import AMBER, BLUE, picture

    with picture(path, len(happened), title=title, share_y=True) as panels:
        for axes, (label, intrusions) in zip(panels, happened.items(), strict=True):
            one = intrusions[0]
            gaps = list(one.gaps(one.sent - quiet, one.answered + quiet / 2))
            axes.axvspan(0, one.ttft, color=AMBER, alpha=0.18, linewidth=0)
            axes.scatter([gap.end - one.sent for gap in gaps], [gap.length * 1e3 for gap in gaps], s=9, color=BLUE)
            axes.set(title=f"{label} tokens per step", xlabel="s since the prompt was sent")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panels[0].set_ylabel("gap between two tokens of a stream, ms")
