"""Server-sent events, and what an OpenAI stream's events say, read with as little work as possible."""

import json
from array import array
from dataclasses import dataclass, field
from typing import Any


class SSEParser:
    """Cuts a byte stream into the data of its events, wherever the network cut it.

    Lines end in LF or CRLF; several ``data`` lines of one event are joined by LF; comments and other fields
    are skipped. (WHATWG HTML, "Server-sent events", but for lone-CR line ends, which no server writes.)
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """The data of every event that ``received`` completes."""
        lines = (self._rest + received).split(b"\n")
        self._rest = lines.pop()
        events: list[bytes] = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[6 if line[5:6] == b" " else 5 :].removesuffix(b"\r"))
            elif self._data and line in (b"", b"\r"):
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data = []
        return events

    def close(self) -> list[bytes]:
        """The data of an event that the stream's end cut off: some servers forget the last blank line."""
        return self.feed(b"\n\n")


@dataclass(slots=True)
class Stream:
    """The facts of one streamed answer, gathered event by event.

    A chunk *carries tokens* when it has a choice, unless that choice only announces the role (a chat's first
    chunk) or only gives the finish reason (its text is empty). A chunk with empty text otherwise counts: its
    token's text is being held back, for a UTF-8 character or a stop string that may be in the making.
    """

    chunk_times: "array[float]" = field(default_factory=lambda: array("d"))
    last: float = 0.0
    finished: bool = False
    done: bool = False
    usage: dict[str, Any] | None = None
    error: str | None = None

    def take(self, event: bytes, now: float) -> None:
        """Account for an event's data that arrived at ``now``, whatever it is."""
        if is_plain_token(event):
            self.chunk_times.append(now)
            self.last = now
        elif event == b"[DONE]":
            self.done = True
        else:
            self._take_json(event, now)

    def _take_json(self, event: bytes, now: float) -> None:
        try:
            chunk = json.loads(event)
        except ValueError:
            self.error = f"an event that is not JSON: {event[:80].decode(errors='replace')}"
            return
        if not isinstance(chunk, dict):
            self.error = f"an event that is not an object: {event[:80].decode(errors='replace')}"
            return
        if chunk.get("error"):
            self.error = f"in the stream: {error_message(chunk)}"
        if isinstance(chunk.get("usage"), dict):
            self.usage = chunk["usage"]
        listed = chunk.get("choices")
        choices = [choice for choice in listed if isinstance(choice, dict)] if isinstance(listed, list) else []
        if any(map(_carries_tokens, choices)):
            self.chunk_times.append(now)
            self.last = now
        if any(choice.get("finish_reason") for choice in choices):
            self.finished = True
            self.last = now


def is_plain_token(event: bytes) -> bool:
    """True only for a chunk that carries tokens and nothing else worth reading; told from its bytes, for speed.

    A key cannot be faked by the text generated: inside a JSON string its quotes would be escaped.
    """
    return (
        (b'"finish_reason":null' in event or b'"finish_reason": null' in event)
        and b'"role"' not in event
        and b'"error"' not in event
        and (b'"usage"' not in event or b'"usage":null' in event or b'"usage": null' in event)
    )


def _carries_tokens(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return bool(choice.get("text")) or ("text" in choice and not choice.get("finish_reason"))
    if any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")):
        return True
    return not choice.get("finish_reason") and "role" not in delta


def error_message(body: Any) -> str:
    """The message inside an error body, OpenAI's shape or nearly so: one line of at most 300 characters."""
    if isinstance(body, dict):
        error = body.get("error", body)
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail") or error
        body = error
    return " ".join(str(body).split())[:300]
