"""A conversation as a chat client holds it: every turn sends the whole past again, with the server's own answers."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.client import Client, Server
from bench.live import follow
from bench.sse import Stream
from engine.errors import OctavoError


@dataclass(frozen=True, slots=True)
class Script:
    """What the user's side says: instructions first, then one question a turn."""

    system: str
    questions: Sequence[str]


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer."""

    ttft: float
    """Seconds from sending to the first token."""
    prompt_tokens: int
    """The whole past with the new question, by the server's count."""
    cached_tokens: int
    """How many of them the server had in its prefix cache."""
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
                self.pieces.append(choice["delta"].get("content") or "")


async def converse(
    client: Client, server: Server, model: str, script: Script, answer_len: int, on_turn: Callable[[], object]
) -> list[Turn]:
    """Hold one conversation, with answers of exactly ``answer_len`` tokens. Raises OctavoError when a turn fails."""
    messages = [{"role": "system", "content": script.system}]
    turns = []
    for question in script.questions:
        messages.append({"role": "user", "content": question})
        turn = await _ask(client, server, model, messages, answer_len)
        messages.append({"role": "assistant", "content": turn.answer})
        turns.append(turn)
        on_turn()
    return turns


async def _ask(client: Client, server: Server, model: str, messages: Sequence[dict[str, str]], answer_len: int) -> Turn:
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": answer_len, "temperature": 0.0}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    posted = json.dumps(body).encode()
    answer = _Answer()
    start = time.perf_counter()
    await follow(client, server, posted, answer)
    usage = answer.usage or {}
    if "prompt_tokens" not in usage:
        raise OctavoError(f"{server.url} gave no usage, so nothing is known of its cache")
    details = usage.get("prompt_tokens_details") or {}
    return Turn(
        answer.chunk_times[0] - start,
        usage["prompt_tokens"],
        details.get("cached_tokens") or 0,
        "".join(answer.pieces),
    )
