"""Text to token ids and back: a thin value around `tokenizers.Tokenizer`, and the detokenizer of a stream."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import tokenizers
from tokenizers.decoders import DecodeStream

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# No character needs as many tokens, so text that is still incomplete after these is noise, shown as it is.
# Without a limit, a stream of invalid bytes would be held back and decoded anew, whole, at every token.
_MOST_HELD_BACK: Final = 32


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's spelling of bytes (GPT-2): printable Latin-1 is itself, the others follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES: Final = _byte_alphabet()


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A model's tokenizer. ``eos_token_ids`` holds every id that ends a generation, whichever file names it."""

    backend: tokenizers.Tokenizer
    bos_token: str | None = None
    eos_token: str | None = None
    eos_token_ids: frozenset[int] = frozenset()
    chat_template: str | None = None

    @cached_property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included. A model's embedding can have more rows, never fewer."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.backend.token_to_id(self.bos_token)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that decoding skips unless asked not to."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Special tokens spelled out in it are recognized."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; U+FFFD stands for bytes that are not UTF-8. Ids out of range are skipped."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token's text, special tokens included; U+FFFD where it holds only part of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that one token stands for; empty if there is no such token."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return token.encode()
        if self._is_byte_level:
            spelled = [_BYTES.get(char) for char in token]
            return token.encode() if None in spelled else bytes(spelled)  # type: ignore[arg-type]
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode()

    def stream(self, *, skip_special_tokens: bool = True) -> "Detokenizer":
        """A detokenizer for one sequence of generated tokens."""
        return Detokenizer(self, skip_special_tokens)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(self.backend.decoder)

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """Ids to decode others after, and their text: a decoder may strip the first token's leading space."""
        ids = self.encode("a", add_special_tokens=False)
        return ids, self.decode(ids)


class Detokenizer:
    """Turns one sequence's tokens into text as they come.

    No piece ends in part of a character, and the pieces and what ``flush`` returns add up to ``decode`` of all
    ids. Two exceptions, both noise: more than 32 tokens without one complete character are shown as U+FFFD, and so
    is the rest of a run of byte-fallback tokens that turns out not to be UTF-8 after its beginning was shown.
    """

    __slots__ = ("_pending", "_skip", "_started", "_stream", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []  # tokens whose text has not been returned yet
        self._started = False

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that is now complete, often all of it, sometimes none."""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer.backend, token_id)
        except Exception:  # noqa: BLE001 (what the library raises when earlier text changes: see the class)
            return self._restart()
        if text is None:
            return self._restart() if len(self._pending) > _MOST_HELD_BACK else ""
        self._pending.clear()
        self._started = True
        return text

    def flush(self) -> str:
        """Ends the sequence; returns what was held back, with U+FFFD for an incomplete character."""
        return self._restart()

    def _restart(self) -> str:
        """Returns the text of the pending tokens, and goes on from there as if all before were complete."""
        anchor, anchor_text = self._tokenizer._anchor
        if not self._started:
            anchor, anchor_text = [], ""
        text = self._tokenizer.decode(anchor + self._pending, skip_special_tokens=self._skip)[len(anchor_text) :]
        self._pending.clear()
        self._started = self._started or bool(text)
        self._stream = DecodeStream(
            ids=self._tokenizer._anchor[0] if self._started else None, skip_special_tokens=self._skip
        )
        return text
