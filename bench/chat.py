"""`octavo bench chat`: what a conversation's next turn costs when the server still knows the ones before.

A chat client sends the whole past with every question. With prefix caching only what is new since the last answer is
computed; without, everything is, and the time to the first token grows with every turn.
"""

import argparse
import asyncio
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bench import local_server, output
from bench.arrivals import ClosedLoop
from bench.extras import require
from bench.measure import percentile
from bench.prompts import Lengths, RandomWords
from engine.errors import OctavoError

if TYPE_CHECKING:
    from bench.conversation import Script, Turn

CACHED, UNCACHED = "prefix caching", "no prefix caching"
SERVERS = {CACHED: ["--prefix-caching"], UNCACHED: ["--no-prefix-caching"]}
"""The servers that are compared, by label, and what sets them apart."""


@dataclass(frozen=True, slots=True)
class TurnSummary:
    """The same turn of all conversations with one server. Times are in milliseconds."""

    turn: int
    prompt_tokens: float
    """Mean, as is ``cached_tokens``."""
    cached_tokens: float
    ttft_p50: float
    ttft_max: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    group = parser.add_argument_group("conversations")
    group.add_argument("--conversations", type=int, default=4, help="default: %(default)s")
    group.add_argument("--turns", type=int, default=5, help="questions in each (default: %(default)s)")
    group.add_argument(
        "--concurrency", type=int, default=1, help="conversations held at the same time (default: %(default)s)"
    )
    group.add_argument(
        "--system-len", type=int, default=1000, help="words of the system prompt, a token each (default: %(default)s)"
    )
    group.add_argument(
        "--shared-system-prompt",
        action="store_true",
        help="the same system prompt in all conversations, so that even first turns may find it cached",
    )
    group.add_argument("--question-len", type=int, default=32, help="words of each question (default: %(default)s)")
    group.add_argument("--answer-len", type=int, default=64, help="tokens of each answer (default: %(default)s)")
    group.add_argument("--timeout", type=float, default=600.0, help="seconds per answer (default: %(default)g)")
    group.add_argument("--seed", type=int, default=0, help="of the words (default: %(default)s)")
    local_server.add_arguments(parser)
    parser.add_argument("--base-url", help="measure this one running server, as it is, instead of two of our own")
    output.add_arguments(parser, plot="the time to the first token, turn by turn")


def run(args: argparse.Namespace) -> int:
    """Hold the same conversations with each server. Returns 0, or 130 if the user stopped it.

    Raises ConfigError for settings that cannot work, OctavoError when a server fails.
    """
    output.at_least(args, 1, "conversations", "turns", "concurrency", "system_len", "question_len", "answer_len")
    server_flags = local_server.flags_of(args)
    require("aiohttp", *(["matplotlib"] if args.plot else []))
    held: dict[str, list[list[Turn]]] = {}
    try:
        if args.base_url:
            held[args.base_url] = _hold(args.base_url, args.base_url, args)
        else:
            for label, flags in SERVERS.items():
                with local_server.local_server([*server_flags, *flags], args.port) as url:
                    held[label] = _hold(label, url, args)
    except KeyboardInterrupt:
        print("interrupted; a server whose conversations were not all held is left out", file=sys.stderr)
        return 130
    _report(args, held)
    return 0


def scripts(args: argparse.Namespace) -> "list[Script]":
    """What is said in each conversation; always the same for the same seed."""
    from bench.conversation import Script

    def words(key: str, length: int, count: int) -> list[str]:
        return [str(prompt.content) for prompt in RandomWords(Lengths(length, 1)).draw(f"{args.seed}/{key}", count)]

    systems = words("system", args.system_len, args.conversations)
    return [
        Script(systems[0 if args.shared_system_prompt else index], words(str(index), args.question_len, args.turns))
        for index in range(args.conversations)
    ]


def _hold(label: str, url: str, args: argparse.Namespace) -> "list[list[Turn]]":
    """Every conversation's turns."""
    from bench.client import Client, Server
    from bench.conversation import Script, converse
    from bench.load_test import event_loop_factory
    from bench.progress import progress

    server = Server(url, "chat", timeout=args.timeout)
    turns: list[list[Turn]] = [[] for _ in range(args.conversations)]
    failures: list[OctavoError] = []

    async def hold() -> None:
        async with Client(server) as client:
            model = await client.model()
            await converse(client, server, model, Script("Be brief.", ["warm up"]), 2, lambda: None)
            with progress(label, args.conversations * args.turns, "turn") as bar:
                planned = scripts(args)

                async def send(index: int, _: float | None) -> None:
                    try:
                        turns[index] = await converse(
                            client, server, model, planned[index], args.answer_len, bar.update
                        )
                    except OctavoError as error:  # a closed loop's users must not raise
                        failures.append(error)

                await ClosedLoop(args.concurrency).drive(send, args.conversations, "")

    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        runner.run(hold())
    if failures:
        raise failures[0]
    return turns


def summarize_turns(conversations: "Sequence[Sequence[Turn]]") -> list[TurnSummary]:
    """One summary per turn, over all conversations."""
    summaries = []
    for number, turns in enumerate(zip(*conversations, strict=True), start=1):
        times = sorted(turn.ttft * 1e3 for turn in turns)
        prompt = sum(turn.prompt_tokens for turn in turns) / len(turns)
        cached = sum(turn.cached_tokens for turn in turns) / len(turns)
        summaries.append(TurnSummary(number, prompt, cached, percentile(times, 50), times[-1]))
    return summaries


def equal_answers(held: "Mapping[str, Sequence[Sequence[Turn]]]") -> tuple[int, int]:
    """(turns that all servers answered alike, turns)."""
    answers = [[turn.answer for turn in itertools.chain(*conversations)] for conversations in held.values()]
    return sum(len(set(same)) == 1 for same in zip(*answers, strict=True)), len(answers[0])


def _report(args: argparse.Namespace, held: "Mapping[str, Sequence[Sequence[Turn]]]") -> None:
    summaries = {label: summarize_turns(conversations) for label, conversations in held.items()}
    title = (
        f"{args.conversations} conversations, {args.concurrency} at a time, system prompts of {args.system_len} words"
    )
    print(f"{title}\n\n{_table(summaries)}")
    if len(held) > 1:
        equal, total = equal_answers(held)
        print(f"\n{equal} of {total} answers are the same with and without the cache.")
    findings: dict[str, Any] = {
        "servers": [
            {"label": label, "turns": [asdict(turn) for turn in summaries[label]], "conversations": _plain(turns)}
            for label, turns in held.items()
        ]
    }
    contents = output.document("chat", add_arguments, args, findings)
    output.save(args, contents, lambda path: _draw(path, summaries, title))


def _plain(conversations: "Sequence[Sequence[Turn]]") -> list[list[dict[str, Any]]]:
    return [[asdict(turn) for turn in turns] for turns in conversations]


def _table(summaries: Mapping[str, Sequence[TurnSummary]]) -> str:
    """A row per turn; the cache's columns are the first server's, whose cache is on."""
    head = ["turn", "prompt\ntokens", "cached\ntokens", "of\nprompt"]
    for label in summaries:
        head += [f"{label}\nTTFT p50 ms", "\nmax ms"]
    if len(summaries) > 1:
        head.append("p50\nratio")
    rows = []
    for turns in zip(*summaries.values(), strict=True):
        first = turns[0]
        row = [str(first.turn), f"{first.prompt_tokens:.0f}", f"{first.cached_tokens:.0f}"]
        row.append(f"{first.cached_tokens / first.prompt_tokens:.0%}")
        for turn in turns:
            row += [output.figure(turn.ttft_p50), output.figure(turn.ttft_max)]
        if len(turns) > 1:
            row.append(f"{turns[-1].ttft_p50 / first.ttft_p50:.1f}")
        rows.append(row)
    return output.table(head, rows)


def _draw(path: str, summaries: Mapping[str, Sequence[TurnSummary]], title: str) -> None:
    from bench.figures import AMBER, BLUE, picture

    with picture(path, 1, title=title, width=7.5) as (axes,):
        for (label, turns), color in zip(summaries.items(), (BLUE, AMBER), strict=False):
            numbers = [turn.turn for turn in turns]
            axes.plot(numbers, [turn.ttft_p50 for turn in turns], "o-", color=color, linewidth=2, label=label)
        axes.set(title="Time to first token, median", xlabel="turn", ylabel="ms", xticks=numbers)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")
