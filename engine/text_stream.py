"""A continuation's text as it grows: tokens in, text out, nothing shown that a stop string may yet take back."""

from dataclasses import dataclass

from engine.tokenizer import Tokenizer


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """The length of the longest end of ``text`` that is the beginning of a stop string."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    for length in range(longest, 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


@dataclass(frozen=True, slots=True)
class TextPiece:
    """New text, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class TextStream:
    """Detokenizes one continuation and watches for its stop strings."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._detokenizer = tokenizer.stream()
        self._stops = stops
        self._pending = ""

    def push(self, token: int, *, may_stop: bool) -> TextPiece:
        """Add a token. While ``may_stop`` is false (before ``min_tokens``) stop strings are ordinary text."""
        text = self._detokenizer.push(token)
        if not (self._stops and may_stop):
            return TextPiece(text)
        return self._scan(self._pending + text)

    def finish(self) -> TextPiece:
        """What was held back, once no more tokens come."""
        piece = self._scan(self._pending + self._detokenizer.flush())
        return piece if piece.stop is not None else TextPiece(piece.text + self._pending)

    def _scan(self, text: str) -> TextPiece:
        found = [(position, stop) for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            position, stop = min(found, key=lambda hit: hit[0])
            self._pending = ""
            return TextPiece(text[:position], stop)
        keep = len(text) - held_back(text, self._stops)
        self._pending = text[keep:]
        return TextPiece(text[:keep])
