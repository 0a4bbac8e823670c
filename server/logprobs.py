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

    def add(self, tokens: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """The arrays of the next tokens; a token's alternatives hold ``count`` entries, and itself if need be."""
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            spelled = self._tokenizer.token_bytes(token.token_id)
            sampled = (token.token_id, token.logprob)
            top = [*token.top[: self._count], sampled]
            best: dict[str, float] = {}
            for token_id, logprob in top:
                # Two tokens can spell the same text; the likelier one keeps the place.
                best.setdefault(_text(self._tokenizer.token_bytes(token_id)), max(logprob, _FLOOR))
            result["tokens"].append(_text(spelled))
            result["token_logprobs"].append(max(token.logprob, _FLOOR))
            result["top_logprobs"].append(best)
            result["text_offset"].append(self._offset)
            if token.token_id not in self._tokenizer.special_token_ids:  # those are not in the text
                self._offset += len(self._decoder.decode(spelled))
        return result

    def add_json(self, tokens: Sequence[TokenLogprob]) -> str:
        """The same as JSON."""
        return json.dumps(self.add(tokens))


def _text(spelled: bytes) -> str:
    """A token's text; one that holds part of a character is spelled in bytes, so that tokens stay apart."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
