"""What a request was about, for the log of an operator who asked for it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.protocol import TokenIds

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer


class Transcript:
    """The first ``limit`` characters, at most, of a request's prompts, all together, and as many of its answers."""

    def __init__(self, limit: int, prompts: Sequence[TokenIds], tokenizer: "Tokenizer") -> None:
        self._limit = limit
        self._room = limit
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._answers: dict[int, str] = {}

    def add(self, index: int, text: str) -> None:
        """The choice ``index`` goes on."""
        if self._room and text:
            self._answers[index] = self._answers.get(index, "") + text[: self._room]
            self._room = max(self._room - len(text), 0)

    def fields(self) -> dict[str, list[str]]:
        """``prompts``, special tokens included, and ``answers`` in the order of choices."""
        prompts, room = [], self._limit
        for ids in self._prompts:
            if not room:
                break
            prompts.append(self._tokenizer.decode(ids[:room], skip_special_tokens=False)[:room])
            room -= len(prompts[-1])
        return {"prompts": prompts, "answers": [self._answers[index] for index in sorted(self._answers)]}
