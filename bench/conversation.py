"""Conversations as a chat client holds them: every turn sends the whole past again, with the server's own answers."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.arrivals import ClosedLoop
from bench.client import Client, Server
from bench.driving import GREEDY
from bench.progress import progress
from bench.sse import Stream
from engine.errors import OctavoError


@dataclass(frozen=True, slots=True)
class Script:
    """What the user's side says: instructions first, then one question a turn."""

    system: str
    questions: Sequence[str]


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer; tokens by the server's count."""

    ttft: float
    """Seconds from sending to the first token."""
    prompt_tokens: int
    """The whole past with the new question."""
    cached_tokens: int
    """How many of them the server had in its prefix cache."""
    output_tokens: int
    answer: str


@dataclass
class _Answer(Stream):
    """A stream whose text is kept: the next turn needs it."""

    pieces: list[str] = field(default_factory=list)

    def take(self, event: bytes, now: float) -> None:
        """Account for an event, and keep the text in it."""
        super().take(event, now)
        if event != b"[DONE]" and self.error is None:
            for choice in json.loads(event).get("choices", ()):
                self.pieces.append(choice.get("delta", {}).get("content") or "")


async def hold_all(
    server: Server, scripts: Sequence[Script], *, answer_len: int, concurrency: int, label: str
) -> list[list[Turn]]:
    """The turns of every conversation, ``concurrency`` of which are held at a time, after one that is not measured.

    Raises OctavoError when a turn fails.
    """
    held: list[list[Turn]] = [[] for _ in scripts]
    failures: list[OctavoError] = []
    async with Client(server) as client:
        model = await client.model()
        await _hold(client, model, Script("Be brief.", ["warm up"]), 2, lambda: None)
        with progress(label, sum(len(script.questions) for script in scripts), "turn") as bar:

            async def send(index: int, _: float | None) -> None:
                try:
                    held[index] = await _hold(client, model, scripts[index], answer_len, bar.update)
                except OctavoError as error:  # a closed loop's users must not raise
                    failures.append(error)

            await ClosedLoop(concurrency).drive(send, len(scripts), "")
    if failures:
        raise failures[0]
    return held


async def _hold(
    client: Client, model: str, script: Script, answer_len: int, on_turn: Callable[[], object]
) -> list[Turn]:
    messages = [{"role": "system", "content": script.system}]
    turns = []
    for question in script.questions:
        messages.append({"role": "user", "content": question})
        turn = await _ask(client, model, messages, answer_len)
        messages.append({"role": "assistant", "content": turn.answer})
        turns.append(turn)
        on_turn()
    return turns


async def _ask(client: Client, model: str, messages: Sequence[dict[str, str]], answer_len: int) -> Turn:
    """The next turn, its answer ``answer_len`` tokens long."""
    body = {**GREEDY, "model": model, "messages": messages, "max_tokens": answer_len}
    # An end of sequence that is ignored has no text: the next turn could not send it, and would find less in the cache.
    body |= {"ignore_eos": False, "min_tokens": answer_len}
    posted, answer = json.dumps(body).encode(), _Answer()
    start = time.perf_counter()
    await client.follow(posted, answer)
    usage: dict[str, Any] = answer.usage or {}
    if "prompt_tokens" not in usage:
        raise OctavoError("the server gives no usage, so nothing is known of its cache")
    return Turn(
        ttft=answer.chunk_times[0] - start,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        output_tokens=usage["completion_tokens"],
        answer="".join(answer.pieces),
    )
