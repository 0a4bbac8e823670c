"""A response's output as it grows: its items, and the events that tell of them.

An answer that is given whole grows just as one that is streamed, so that both are the same.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from server.tool_parser import CallDelta, ToolCallParser

Event = tuple[str, Mapping[str, Any]]
"""Its type, and its other fields but for the number."""
Logprobs = Sequence[Mapping[str, Any]]


class ResponseOutput:
    """Messages and calls in the order in which the model makes them; the last one may be open."""

    def __init__(self, parser: ToolCallParser | None) -> None:
        """``parser`` reads calls out of the text, where there can be any."""
        self.items: list[dict[str, Any]] = []
        self.complete = False
        """Whether the model came to its end."""
        self._parser = parser
        self._open = False
        self._pieces: list[str] = []
        """Text, or arguments, of the open item."""
        self._logprobs: list[Mapping[str, Any]] = []
        """Of the open message's tokens that events have told of."""
        self._untold: list[Mapping[str, Any]] = []
        """Of tokens whose text has not come yet."""

    def push(self, text: str, logprobs: Logprobs = ()) -> list[Event]:
        """Add what the model said, and the log-probabilities of its tokens."""
        self._untold += logprobs
        if self._parser is None:
            return self._say(text)
        return self._read(self._parser.push(text))

    def finish(self, *, complete: bool) -> list[Event]:
        """No more comes; unless it is ``complete`` the model was cut off."""
        self.complete = complete
        events = [] if self._parser is None else self._read(self._parser.finish())
        if not self.items:
            events += self._begin_message()
        return events + self._close("completed" if complete else "incomplete")

    def so_far(self) -> list[dict[str, Any]]:
        """The items of an answer that is broken off here."""
        self._close("incomplete")
        return self.items

    def _read(self, pieces: Sequence[str | CallDelta]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            events += self._say(piece) if isinstance(piece, str) else self._call(piece)
        return events

    def _say(self, text: str) -> list[Event]:
        if not text:
            return []
        events = []
        if not (self._open and self.items[-1]["type"] == "message"):
            events = [*self._close("completed"), *self._begin_message()]
        self._pieces.append(text)
        logprobs, self._untold = self._untold, []
        self._logprobs += logprobs
        return [*events, self._event("output_text.delta", content_index=0, delta=text, logprobs=logprobs)]

    def _call(self, delta: CallDelta) -> list[Event]:
        self._untold = []  # of tokens that are no text
        events = []
        if delta.id is not None:
            events = self._close("completed")
            item = {"type": "function_call", "call_id": delta.id, "name": delta.name, "arguments": ""}
            events.append(self._begin("fc", item))
        if delta.arguments:
            self._pieces.append(delta.arguments)
            events.append(self._event("function_call_arguments.delta", delta=delta.arguments))
        return events

    def _begin(self, prefix: str, item: Mapping[str, Any]) -> Event:
        self.items.append({"id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **item})
        self._open, self._pieces, self._logprobs = True, [], []
        return "response.output_item.added", {"output_index": len(self.items) - 1, "item": dict(self.items[-1])}

    def _begin_message(self) -> list[Event]:
        added = self._begin("msg", {"type": "message", "role": "assistant", "content": []})
        return [added, self._event("content_part.added", content_index=0, part=_part("", []))]

    def _close(self, status: str) -> list[Event]:
        if not self._open:
            return []
        item, text = self.items[-1], "".join(self._pieces)
        self._open = False
        item["status"] = status
        if item["type"] == "message":
            part = _part(text, [*self._logprobs, *self._untold])
            item["content"] = [part]
            told = {"content_index": 0, "text": text, "logprobs": part["logprobs"]}
            events = [
                self._event("output_text.done", **told),
                self._event("content_part.done", content_index=0, part=part),
            ]
        else:
            item["arguments"] = text
            events = [self._event("function_call_arguments.done", name=item["name"], arguments=text)]
        self._untold = []
        return [*events, ("response.output_item.done", {"output_index": len(self.items) - 1, "item": item})]

    def _event(self, kind: str, **fields: Any) -> Event:
        """An event about the last item."""
        return f"response.{kind}", {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


def _part(text: str, logprobs: list[Mapping[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
