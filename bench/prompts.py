"""What is sent: prompts from random tokens or words, from windows of a text file, or from the lines of a JSONL file.

A source draws the prompts of one run from a key that names the run (level and repeat), so that they are the
same whenever the seed is, and differ between requests, levels and repeats: no server's prefix cache can help.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.errors import ConfigError

FIRST_RANDOM_ID = 1000
"""Random ids start here, past the special tokens and single bytes that open most vocabularies."""
DEFAULT_VOCAB_SIZE = 30_000
"""Below the vocabulary of every model in common use, so ids up to here are always legal."""
WORDS_PER_TOKEN = 0.75
"""English prose under today's vocabularies; the server's usage gives the true counts."""

# Short common words: with a space before it, each is one token in the usual vocabularies.
_WORDS = """
    about after again air all also always and animal answer are around ask away back because been before
    begin below best better between big black blue book both boy bring brother but call came can car carry
    change children city close cold come could country cut day did different do does down each early earth
    eat end enough even every example eye face fact family far farm father feel feet few find fire first
    fish five follow food for form found four friend from game gave girl give good great green ground group
    grow had half hand hard has have head hear help here high home horse hot house how idea important into
    just keep kind king know land large last late learn leave left less let letter life light like line list
    little live long look made make man many mark may mean men might mile money morning most mother mountain
    move much music must name near need never new next night north not
""".split()  # noqa: SIM905 (a list would take two hundred lines)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: text, token ids or chat messages, with the number of tokens to ask for."""

    content: str | list[int] | list[dict[str, Any]]
    output_len: int

    @property
    def length(self) -> int | None:
        """Tokens in the prompt where the client can know: token ids only."""
        return len(self.content) if isinstance(self.content, list) and _are_ids(self.content) else None


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and output lengths in tokens: uniform within ``mean`` ± ``ratio`` × ``mean``, never below 1."""

    input_len: int = 256
    output_len: int = 128
    ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.input_len < 1 or self.output_len < 1:
            raise ConfigError("--input-len and --output-len must be at least 1")
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"--random-range-ratio must be at least 0 and below 1, not {self.ratio:g}")

    def draw(self, source: random.Random) -> tuple[int, int]:
        """(prompt length, output length)."""
        return self._around(self.input_len, source), self._around(self.output_len, source)

    def _around(self, mean: int, source: random.Random) -> int:
        spread = int(mean * self.ratio)
        return max(1, source.randint(mean - spread, mean + spread))


class PromptSource(Protocol):
    """Where prompts come from."""

    def draw(self, key: str, count: int) -> list[Prompt]:
        """``count`` prompts, always the same for the same key."""
        ...


@dataclass(frozen=True, slots=True)
class RandomIds:
    """Prompts of uniformly random token ids in [``FIRST_RANDOM_ID``, ``vocab_size``); the whole range if that
    is empty.
    """

    lengths: Lengths
    vocab_size: int = DEFAULT_VOCAB_SIZE

    def draw(self, key: str, count: int) -> list[Prompt]:
        ids = range(FIRST_RANDOM_ID if self.vocab_size > 2 * FIRST_RANDOM_ID else 0, self.vocab_size)
        source = random.Random(key)
        prompts = []
        for _ in range(count):
            input_len, output_len = self.lengths.draw(source)
            prompts.append(Prompt(source.choices(ids, k=input_len), output_len))
        return prompts


@dataclass(frozen=True, slots=True)
class RandomWords:
    """Prompts of random short English words, about one token each, for servers that take no token ids."""

    lengths: Lengths

    def draw(self, key: str, count: int) -> list[Prompt]:
        source = random.Random(key)
        prompts = []
        for _ in range(count):
            input_len, output_len = self.lengths.draw(source)
            prompts.append(Prompt(" ".join(source.choices(_WORDS, k=input_len)), output_len))
        return prompts


@dataclass(frozen=True, slots=True)
class TextWindows:
    """Prompts cut from a text at random words, ``input_len`` tokens long or so; read in a circle."""

    lengths: Lengths
    words: Sequence[str]

    def draw(self, key: str, count: int) -> list[Prompt]:
        source, total = random.Random(key), len(self.words)
        # No two windows of a run start at the same word, unless the text has fewer words than that.
        starts = source.sample(range(total), k=count) if count <= total else source.choices(range(total), k=count)
        prompts = []
        for start in starts:
            input_len, output_len = self.lengths.draw(source)
            size = max(1, round(input_len * WORDS_PER_TOKEN))
            words = [self.words[(start + offset) % total] for offset in range(size)]
            prompts.append(Prompt(" ".join(words), output_len))
        return prompts


@dataclass(frozen=True, slots=True)
class Dataset:
    """Prompts taken from a list in random order; it starts again when the list is exhausted."""

    lengths: Lengths
    contents: Sequence[str | list[int] | list[dict[str, Any]]]

    def draw(self, key: str, count: int) -> list[Prompt]:
        source = random.Random(key)
        order: list[int] = []
        while len(order) < count:
            order += source.sample(range(len(self.contents)), k=len(self.contents))
        return [Prompt(self.contents[index], self.lengths.draw(source)[1]) for index in order[:count]]


def open_source(prompts: str, *, lengths: Lengths, as_text: bool, vocab_size: int) -> PromptSource:
    """The source that ``--prompts`` names: ``random``, a ``.jsonl`` file, or any other file as text.

    Raises ConfigError when the file cannot be read or holds no prompt.
    """
    if prompts == "random":
        if vocab_size < 2:
            raise ConfigError(f"--vocab-size must be at least 2, not {vocab_size}")
        return RandomWords(lengths) if as_text else RandomIds(lengths, vocab_size)
    try:
        text = Path(prompts).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {prompts}: {getattr(error, 'strerror', None) or error}") from None
    if prompts.endswith((".jsonl", ".ndjson")):
        return Dataset(lengths, parse_jsonl(text, prompts))
    words = text.split()
    if not words:
        raise ConfigError(f"--prompts {prompts}: the file holds no words")
    return TextWindows(lengths, words)


def parse_jsonl(text: str, name: str) -> list[str | list[int] | list[dict[str, Any]]]:
    """The prompt of each line. A line is an object with one of ``prompt`` (text or token ids), ``messages``
    (a chat), ``turns`` (texts; the first is taken, as the next would need the answer to it) or ``text``.

    Raises ConfigError naming the first line that has none of them.
    """
    contents = []
    # Not splitlines(): it would also split at characters such as U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"--prompts {name}: line {number} is not JSON: {error}") from None
        content = _content(row) if isinstance(row, dict) else None
        if not content:
            raise ConfigError(f"--prompts {name}: line {number} has none of prompt, messages, turns, text")
        contents.append(content)
    if not contents:
        raise ConfigError(f"--prompts {name}: the file holds no prompts")
    return contents


def _content(row: Mapping[str, Any]) -> str | list[int] | list[dict[str, Any]] | None:
    prompt, messages, turns, text = (row.get(key) for key in ("prompt", "messages", "turns", "text"))
    if isinstance(prompt, str) or (isinstance(prompt, list) and _are_ids(prompt)):
        return prompt
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        return messages
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        return turns[0]
    return text if isinstance(text, str) else None


def _are_ids(values: Sequence[object]) -> bool:
    return all(type(value) is int for value in values)


def request_body(prompt: Prompt, *, chat: bool, common: Mapping[str, Any], extra: Mapping[str, Any]) -> bytes:
    """The JSON to post. ``common`` holds what all requests share; ``extra`` (the user's) overrides everything.

    Raises ConfigError for token ids on the chat endpoint.
    """
    body: dict[str, Any] = {**common, "max_tokens": prompt.output_len}
    content = prompt.content
    if chat:
        if isinstance(content, list) and _are_ids(content):
            raise ConfigError(
                "the chat endpoint takes no token ids: use --prompt-format text, or --endpoint completions"
            )
        body["messages"] = [{"role": "user", "content": content}] if isinstance(content, str) else content
    elif isinstance(content, list) and not _are_ids(content):
        body["prompt"] = "\n\n".join(
            str(message.get("content", "")) for message in content if isinstance(message, dict)
        )
    else:
        body["prompt"] = content
    return json.dumps({**body, **extra}).encode()
