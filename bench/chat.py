"""`octavo bench chat`: what a conversation's next turn costs when the server still knows the ones before.

A chat client sends the whole past with every question. With prefix caching only what is new since the last answer is
computed; without, everything is, and the time to the first token grows with every turn.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from bench import flags, local_server, output
from bench.extras import require
from bench.measure import percentile
from bench.prompts import Lengths, RandomWords

if TYPE_CHECKING:
    from bench.conversation import Script, Turn

SERVERS = {"prefix caching": ["--prefix-caching"], "no prefix caching": ["--no-prefix-caching"]}
"""The servers that are compared, by label, and what sets them apart."""


@dataclass(frozen=True, slots=True)
class TurnSummary:
    """The same turn of all conversations with one server. Times are in milliseconds."""

    turn: int
    prompt_tokens: float
    """Mean, as is ``cached_tokens``."""
    cached_tokens: float
    most_repeated: int
    """The most tokens of the turns before, answers included, that a conversation's cache lacked: computed once more."""
    ttft_p50: float
    ttft_max: float

    @property
    def computed_tokens(self) -> float:
        """Prompt tokens that were not found in the cache."""
        return self.prompt_tokens - self.cached_tokens


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
    group.add_argument("--seed", type=int, default=0, help="of the words (default: %(default)s)")
    local_server.add_arguments(parser, base_url="measure this one running server, as it is, instead of two of our own")
    output.add_arguments(parser, plot="the time to the first token, turn by turn")


def run(args: argparse.Namespace) -> int:
    """Hold the same conversations with each server. Returns 0, or 130 if the user stopped it.

    Raises ConfigError for settings that cannot work, OctavoError when a server fails.
    """
    local_server.check(args)
    flags.at_least(args, 1, "conversations", "turns", "concurrency", "system_len", "question_len", "answer_len")
    require("aiohttp")
    output.check(args)
    from bench import conversation, loop
    from bench.client import Server

    def hold(label: str, url: str) -> "list[list[Turn]]":
        server = Server(url, "chat", timeout=args.timeout)
        settings = {"answer_len": args.answer_len, "concurrency": args.concurrency}
        return loop.run(conversation.hold_all(server, scripts(args), label=label, **settings))

    held, interrupted = local_server.measure_each(args, SERVERS.items(), hold)
    if held:
        _report(args, dict(held), interrupted)
    return output.INTERRUPTED if interrupted else 0


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


def summarize_turns(conversations: "Sequence[Sequence[Turn]]") -> list[TurnSummary]:
    """One summary per turn, over all conversations."""
    summaries = []
    for index, turns in enumerate(zip(*conversations, strict=True)):
        times = sorted(turn.ttft * 1e3 for turn in turns)
        summaries.append(
            TurnSummary(
                turn=index + 1,
                prompt_tokens=_mean([turn.prompt_tokens for turn in turns]),
                cached_tokens=_mean([turn.cached_tokens for turn in turns]),
                most_repeated=max(_repeated(conversation, index) for conversation in conversations),
                ttft_p50=percentile(times, 50),
                ttft_max=times[-1],
            )
        )
    return summaries


def _repeated(conversation: "Sequence[Turn]", index: int) -> int:
    if index == 0:
        return 0
    before = conversation[index - 1]
    return max(0, before.prompt_tokens + before.output_tokens - conversation[index].cached_tokens)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def equal_answers(held: "Mapping[str, Sequence[Sequence[Turn]]]") -> tuple[int, int]:
    """(turns that all servers answered alike, turns)."""
    answers = [[turn.answer for turn in itertools.chain(*conversations)] for conversations in held.values()]
    return sum(len(set(same)) == 1 for same in zip(*answers, strict=True)), len(answers[0])


def _report(args: argparse.Namespace, held: "Mapping[str, Sequence[Sequence[Turn]]]", interrupted: bool) -> None:
    summaries = {label: summarize_turns(conversations) for label, conversations in held.items()}
    title = (
        f"{args.conversations} conversations, {args.concurrency} at a time, system prompts of {args.system_len} words"
    )
    print(f"{title}\n\n{_table(summaries)}\n")
    for label, turns in summaries.items():
        if len(turns) > 1:
            most = max(turn.most_repeated for turn in turns)
            print(f"{label}: up to {most:,} tokens of the turns before were computed again.")
    if len(held) > 1:
        equal, total = equal_answers(held)
        print(f"{equal} of {total} answers are the same with both servers.")
    findings = {
        "interrupted": interrupted,
        "servers": [
            {
                "label": label,
                "turns": [asdict(turn) for turn in summaries[label]],
                "conversations": [[asdict(turn) for turn in turns] for turns in conversations],
            }
            for label, conversations in held.items()
        ],
    }
    contents = output.document("chat", add_arguments, args, findings)
    output.save(args, contents, partial(_draw, summaries=summaries, title=title))


def _table(summaries: Mapping[str, Sequence[TurnSummary]]) -> str:
    """A row per turn."""
    head = ["turn", "prompt\ntokens"]
    for label in summaries:
        head += [f"{label}:\ncomputed", "TTFT\np50 ms", "\nmax ms"]
    if len(summaries) > 1:
        head.append("p50\nratio")
    rows = []
    for turns in zip(*summaries.values(), strict=True):
        row = [str(turns[0].turn), f"{turns[0].prompt_tokens:,.0f}"]
        for turn in turns:
            row += [f"{turn.computed_tokens:,.0f}", output.figure(turn.ttft_p50), output.figure(turn.ttft_max)]
        if len(turns) > 1:
            row.append(f"{turns[-1].ttft_p50 / turns[0].ttft_p50:.1f}")
        rows.append(row)
    return output.table(head, rows)


def _draw(path: str, summaries: Mapping[str, Sequence[TurnSummary]], title: str) -> None:
    from bench.figures import AMBER, BLUE, GREY, picture

    with picture(path, 1, title=title, width=7.5) as (axes,):
        for (label, turns), color in zip(summaries.items(), (BLUE, AMBER), strict=False):
            numbers = [turn.turn for turn in turns]
            axes.plot(numbers, [turn.ttft_p50 for turn in turns], "o-", color=color, linewidth=2, label=label)
            axes.plot(numbers, [turn.ttft_max for turn in turns], "_", color=color, markersize=9, markeredgewidth=1.6)
        axes.plot([], [], "_", color=GREY, markersize=9, markeredgewidth=1.6, label="slowest conversation")
        axes.set(title="Time to first token, median of the conversations", xlabel="turn", ylabel="ms", xticks=numbers)
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")
