"""`octavo bench serve`: the flags, and the plan that they amount to. The work is in ``bench.load_test``."""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench import flags, invocation, output
from bench.arrivals import Level, parse_concurrency, parse_rate
from bench.extras import require
from bench.measure import OBJECTIVES
from bench.prompts import DEFAULT_VOCAB_SIZE, FIRST_RANDOM_ID, Lengths, PromptSource, open_source
from engine.errors import ConfigError

DEFAULT_CONCURRENCY = "1,8,32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    _add_server_arguments(parser.add_argument_group("server"))
    _add_load_arguments(parser)
    _add_prompt_arguments(parser.add_argument_group("prompts"))
    report = output.add_arguments(parser, plot="throughput against latency, and the CDFs of TTFT and ITL")
    report.add_argument(
        "--goodput",
        metavar="ttft=MS,tpot=MS",
        help="also count the requests that meet these limits (ttft, tpot, latency)",
    )
    report.add_argument("--details", action="store_true", help="with --json: every request's times too")
    report.add_argument("--label", help="what to call this server in the JSON and the plot (default: the model)")


def _add_server_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--base-url", default="http://127.0.0.1:8000", help="where it listens (default: %(default)s)")
    group.add_argument(
        "--endpoint", choices=("completions", "chat"), default="completions", help="default: %(default)s"
    )
    group.add_argument("--model", help="the model to ask for (default: the first that /v1/models lists)")
    group.add_argument("--api-key", help="sent as a bearer token; never written to the report")
    group.add_argument("--timeout", type=float, default=600.0, help="seconds per request (default: %(default)g)")
    group.add_argument("--temperature", type=float, default=0.0, help="default: %(default)g, greedy")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="ask for outputs of full length (default: yes, but no for a .jsonl file)",
    )
    group.add_argument(
        "--stream-usage",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for token counts by stream_options; without, chunks are counted (default: yes)",
    )
    group.add_argument("--extra-body", metavar="JSON", default="{}", help="fields to add to every request's body")


def _add_load_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--concurrency",
        metavar="N,N,...",
        help=f"closed loop: this many requests in flight, one level after another; inf for all at once "
        f"(default: {DEFAULT_CONCURRENCY})",
    )
    kind.add_argument("--rate", metavar="R,R,...", help="open loop: Poisson arrivals, this many requests/s on average")
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="gamma shape of the open loop's gaps; 1 is Poisson, below is burstier",
    )
    group.add_argument(
        "--num-requests",
        type=int,
        metavar="N",
        help="per level and repeat (default: max(8, 4 x concurrency), 64 for inf, 30 s of an open loop)",
    )
    group.add_argument(
        "--repeats", type=int, default=1, help="times that all levels are measured (default: %(default)s)"
    )
    group.add_argument(
        "--warmup", type=int, default=1, help="unmeasured requests before each run (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default: %(default)s)")


def _add_prompt_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompts",
        default="random",
        metavar="random|FILE",
        help="random tokens, a .jsonl file's lines (prompt, messages, turns or text), or windows of a text file",
    )
    group.add_argument(
        "--prompt-format",
        choices=("auto", "ids", "text"),
        default="auto",
        help="random prompts as token ids (auto on completions) or as random words (auto on chat)",
    )
    group.add_argument("--input-len", type=int, default=256, help="mean prompt length in tokens (default: %(default)s)")
    group.add_argument("--output-len", type=int, default=128, help="mean tokens to generate (default: %(default)s)")
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="lengths are uniform within mean x (1 - R) and mean x (1 + R) (default: all equal)",
    )
    group.add_argument(
        "--vocab-size",
        type=int,
        default=DEFAULT_VOCAB_SIZE,
        help=f"random ids lie from {FIRST_RANDOM_ID} up to this (default: %(default)s)",
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, resolved and checked."""

    levels: tuple[Level, ...]
    source: PromptSource
    chat: bool
    ignore_eos: bool
    extra_body: Mapping[str, Any]
    objective: Mapping[str, float]

    def requests(self, level: Level, args: argparse.Namespace) -> int:
        """How many requests one run of a level sends."""
        return int(args.num_requests or level.default_requests())


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the flags against one another. Raises ConfigError, naming the flag at fault."""
    flags.at_least(args, 1, "num_requests", "repeats")
    flags.at_least(args, 0, "warmup")
    flags.positive(args, "timeout")
    flags.http_address(args.base_url, "--base-url")
    chat = args.endpoint == "chat"
    if chat and args.prompts == "random" and args.prompt_format == "ids":
        raise ConfigError("the chat endpoint takes no token ids: use --prompt-format text, or --endpoint completions")
    levels: tuple[Level, ...] = tuple(
        parse_rate(args.rate, args.burstiness)
        if args.rate is not None
        else parse_concurrency(args.concurrency if args.concurrency is not None else DEFAULT_CONCURRENCY)
    )
    source = open_source(
        args.prompts,
        lengths=Lengths(args.input_len, args.output_len, args.random_range_ratio),
        as_text=chat if args.prompt_format == "auto" else args.prompt_format == "text",
        vocab_size=args.vocab_size,
    )
    free_length = args.prompts.endswith((".jsonl", ".ndjson"))
    ignore_eos = not free_length if args.ignore_eos is None else args.ignore_eos
    return Plan(levels, source, chat, ignore_eos, _extra_body(args.extra_body), parse_objective(args.goodput))


def parse_objective(text: str | None, flag: str = "--goodput") -> dict[str, float]:
    """Limits in milliseconds from text like ``ttft=200,tpot=50``. Raises ConfigError, naming the flag."""
    objective: dict[str, float] = {}
    for item in (text or "").split(","):
        if not item.strip():
            continue
        name, _, limit = (part.strip() for part in item.partition("="))
        try:
            objective[name] = float(limit)
        except ValueError:
            objective[name] = math.nan
        if name not in OBJECTIVES or not objective[name] > 0:
            raise ConfigError(f"{flag} takes {', '.join(OBJECTIVES)} with milliseconds, like ttft=200, not {item!r}")
    return objective


def _extra_body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ConfigError("--extra-body must be a JSON object")
    return body


def public_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The command's arguments as a report may show them: no key, and files by their names alone."""
    shown = invocation.public_arguments(add_arguments, args, ("prompts", "json", "plot"))
    return {**shown, "api_key": "***" if args.api_key else None}


def command_line(args: argparse.Namespace) -> str:
    """The shortest command that does the same, as a report may show it."""
    return invocation.command_line("serve", add_arguments, public_arguments(args))


def run(args: argparse.Namespace) -> int:
    """Measure and report. Returns 0; 1 if any request failed; 130 if the user stopped it.

    Raises ConfigError when the flags make no sense or the server cannot be used.
    """
    plan = make_plan(args)
    require("aiohttp")
    output.check(args)
    from bench.load_test import execute  # aiohttp is needed only from here on

    return execute(plan, args)
