"""A tokenizer as llguidance takes it: every token's bytes, exactly as they become text here, and text as tokens."""

from functools import cached_property

from engine.tokenizer import Tokenizer

_SENTINEL = "\x02"
"""Text that no token joins with what follows: a tokenizer may treat the beginning of a text in its own way, such as to
put a space before it."""


class GrammarVocabulary:
    """The attributes have the names that `llguidance.TokenizerWrapper` asks for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._sentinel = self._encode("")
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(max(vocab_size, tokenizer.vocab_size))]
        self.special_token_ids = sorted(tokenizer.special_token_ids)

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of text that a grammar leaves no choice about: those that the model knows it by."""
        ids = self._encode(text.decode(errors="replace"))
        begins = len(self._sentinel)
        if ids[:begins] == self._sentinel and self._spell(ids[begins:]) == text:
            return ids[begins:]
        return self._longest(text)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(_SENTINEL + text, add_special_tokens=False)

    def _spell(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[token] for token in ids)

    def _longest(self, text: bytes) -> list[int]:
        """Always the longest token; bytes that no token begins with are left out."""
        ids, start = [], 0
        while start < len(text):
            ends = range(min(start + self._longest_token, len(text)), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:
                start += 1
                continue
            ids.append(self._ids[text[start:end]])
            start = end
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {spelled: token for token, spelled in enumerate(self.tokens) if spelled and token not in special}

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._ids), default=0)
