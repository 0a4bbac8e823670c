"""Log-probabilities in OpenAI's two shapes: aligned arrays for completions, a list of objects for chat."""

import codecs
import json
from collections.abc import Sequence
from typing import Any

from engine.outputs import TokenLogprob
from engine.tokenizer import Tokenizer

_FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob], count: int) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}]}` with ``count`` alternatives per token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        spelled = tokenizer.token_bytes(token_id)
        return {
            "token": _text(spelled),
            "logprob": max(logprob, _FLOOR),
            "bytes": list(spelled),
        }

    content = [
        {
            **entry(token.token_id, token.logprob),
            "top_logprobs": [entry(token_id, logprob) for token_id, logprob in token.top[:count]],
        }
        for token in tokens
    ]
    return {"content": content}


class LegacyLogprobs:
    """The completions endpoint's arrays for one choice, whole or chunk by chunk; offsets count characters."""

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._offset = 0
        # A token may hold a part of a character: it counts where it is complete, as in the text.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, tokens: Sequence[TokenLogprob], *, first: int | None = None) -> dict[str, list[Any]]:
        """The arrays of the next tokens; a token's alternatives hold ``count`` entries, and itself if need be.

        ``first`` is a prompt's first token, which stands before them; nothing says how likely it is.
        """
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if first is not None:
            self._place(result, first, None, None)
        for token in tokens:
            best: dict[str, float] = {}
            for token_id, logprob in (*token.top[: self._count], (token.token_id, token.logprob)):
                # Two tokens can spell the same text; the likelier one keeps the place.
                best.setdefault(_text(self._tokenizer.token_bytes(token_id)), max(logprob, _FLOOR))
            self._place(result, token.token_id, max(token.logprob, _FLOOR), best)
        return result

    def add_json(self, tokens: Sequence[TokenLogprob], *, first: int | None = None) -> str:
        """The same as JSON."""
        return json.dumps(self.add(tokens, first=first))

    def _place(
        self, arrays: dict[str, list[Any]], token_id: int, logprob: float | None, best: dict[str, float] | None
    ) -> None:
        spelled = self._tokenizer.token_bytes(token_id)
        values = {
            "tokens": _text(spelled),
            "token_logprobs": logprob,
            "top_logprobs": best,
            "text_offset": self._offset,
        }
        for name, value in values.items():
            arrays[name].append(value)
        if token_id not in self._tokenizer.special_token_ids:  # those are not in the text
            self._offset += len(self._decoder.decode(spelled))


def _text(spelled: bytes) -> str:
    """A token's text; one that holds part of a character is spelled in bytes, so that tokens stay apart."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
