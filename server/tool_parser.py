"""From an answer's text, as it comes, to what it says and what it calls."""

import json
import re
import secrets
import string
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from engine.text_stream import held_back
from server.tool_format import ToolFormat

_SEPARATORS: Final = " \t\r\n[],;"
_HEAD: Final = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""A call up to its arguments, if they are an object; what is written in another order is read when it is complete."""
_LONGEST_HEAD: Final = 512
_BRACKETS: Final = re.compile(r'["\\{}\[\]]')


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is new of one call: first its id and name, then its arguments piece by piece."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


Piece = str | CallDelta
"""Words of the answer, or part of a call."""


class JsonExtent:
    """Finds where a JSON object ends that comes in pieces; ``depth`` of its brackets are open already."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._quoted = False
        self._escaped = False

    def feed(self, text: str) -> int | None:
        """How much of the next text belongs to the object, once its end is there."""
        position = 0
        while position < len(text):
            if self._escaped:
                self._escaped = False
                position += 1
                continue
            found = _BRACKETS.search(text, position)
            if found is None:
                return None
            position = found.end()
            match found[0]:
                case '"':
                    self._quoted = not self._quoted
                case "\\":
                    self._escaped = self._quoted
                case "{" | "[" if not self._quoted:
                    self._depth += 1
                case "}" | "]" if not self._quoted:
                    self._depth -= 1
                    if self._depth <= 0:
                        return position
        return None


class ToolCallParser:
    """Reads one choice. Only calls of the given ``names`` are calls; all else is text, kept as it was written.

    Dropped are calls beyond ``most``, and white space between what is said and a call, and after the last one.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], most: int | None = None) -> None:
        self._form = form
        self._most = most
        self._names = names
        self._closing = form.closing.strip()
        self._state: Callable[[list[Piece]], bool] = self._read_words
        self._buffer = ""
        self._undone = ""
        """What was read since the marker, should it turn out to be no call."""
        self._extent = JsonExtent()
        self._scanned = 0
        self._said = False
        self.num_calls = 0

    def push(self, text: str) -> list[Piece]:
        """Add text; returns what is now certain."""
        self._buffer += text
        pieces: list[Piece] = []
        while self._state(pieces):
            pass
        return [piece for piece in pieces if isinstance(piece, str) or self._most is None or piece.index < self._most]

    def finish(self) -> list[Piece]:
        """What was held back, once no more text comes."""
        pieces: list[Piece] = []
        unread = self._state in (self._read_words, self._read_object)
        if unread or (self._state == self._read_separators and self._undone):
            self._say(self._undone + self._buffer, pieces)
        self._buffer = self._undone = ""
        return pieces

    # Each of these reads a part of the buffer: True if the next state may find more in the rest.

    def _read_words(self, pieces: list[Piece]) -> bool:
        form, text = self._form, self._buffer
        if form.bare and not self._said and not self.num_calls and text.lstrip().startswith("{"):
            self._buffer = text.lstrip()
            self._undone = text[: len(text) - len(self._buffer)]
            self._state = self._read_separators
            return True
        position = text.find(form.marker)
        if position >= 0:
            self._say(text[:position].rstrip(), pieces)
            self._undone, self._buffer = form.marker, text[position + len(form.marker) :]
            self._state = self._read_separators
            return True
        keep = len(text[: len(text) - held_back(text, (form.marker,))].rstrip())
        self._say(text[:keep], pieces)
        self._buffer = text[keep:]
        return False

    def _read_separators(self, pieces: list[Piece]) -> bool:
        rest = self._buffer.lstrip(_SEPARATORS)
        if self._undone:
            self._undone += self._buffer[: len(self._buffer) - len(rest)]
        self._buffer = rest
        if not rest or (self._closing and self._closing != rest and self._closing.startswith(rest)):
            return False
        if rest.startswith("{"):
            self._extent, self._scanned = JsonExtent(), 0
            self._state = self._read_object
            return True
        if self._closing and rest.startswith(self._closing):
            self._buffer = rest[len(self._closing) :]
            if self._undone:
                self._undone += self._closing
        self._give_up(pieces)
        return True

    def _read_object(self, pieces: list[Piece]) -> bool:
        head = _HEAD.match(self._buffer[:_LONGEST_HEAD]) if self._scanned < _LONGEST_HEAD else None
        if head is not None and (name := _string(head[1])) in self._names:
            self._begin_call(name, pieces)
            self._buffer = self._buffer[head.end() :]
            self._extent = JsonExtent()
            self._state = self._read_arguments
            return True
        end = self._extent.feed(self._buffer[self._scanned :])
        if end is None:
            self._scanned = len(self._buffer)
            return False
        end += self._scanned
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        call = _call(text)
        if call is None or call[0] not in self._names:
            self._undone += text
            self._give_up(pieces)
            return True
        self._begin_call(call[0], pieces)
        pieces.append(CallDelta(self.num_calls - 1, call[1]))
        self._state = self._read_separators
        return True

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        end = self._extent.feed(self._buffer)
        text = self._buffer if end is None else self._buffer[:end]
        if text:
            pieces.append(CallDelta(self.num_calls - 1, text))
        self._buffer = self._buffer[len(text) :]
        if end is None:
            return False
        self._extent = JsonExtent(depth=1)
        self._state = self._read_rest
        return True

    def _read_rest(self, pieces: list[Piece]) -> bool:
        """What is left of a call's object behind its arguments."""
        del pieces
        end = self._extent.feed(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is not None:
            self._state = self._read_separators
        return end is not None

    def _begin_call(self, name: str, pieces: list[Piece]) -> None:
        pieces.append(CallDelta(self.num_calls, id=_new_id(self._form), name=name))
        self.num_calls += 1
        self._undone = ""

    def _give_up(self, pieces: list[Piece]) -> None:
        """What was read since the marker is text, and so may be what follows."""
        self._say(self._undone, pieces)
        self._undone = ""
        self._state = self._read_words

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if text and (not self.num_calls or text.strip()):
            self._said = True
            pieces.append(text)


def _string(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


def _call(text: str) -> tuple[str, str] | None:
    """The name and the arguments, as JSON, of a call that is complete."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _new_id(form: ToolFormat) -> str:
    if form.nine_letter_ids:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return f"call_{uuid.uuid4().hex[:24]}"
