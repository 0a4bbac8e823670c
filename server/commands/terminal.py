"""What the commands that run a model in the terminal share: their settings, and text that appears as it is made."""

import asyncio
import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from engine.config import setting
from engine.errors import ConfigError
from engine.sampling_params import SamplingParams
from engine.setting_values import integer, number, text

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine


def _share(value: object) -> float:
    """A number above 0 and up to 1."""
    result: float = number(0, 1)(value)
    if result == 0:
        raise ValueError("expected a number above 0, up to 1")
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class TerminalConfig:
    """How `octavo chat` and `octavo generate` sample; None means: as the checkpoint recommends."""

    max_tokens: int | None = setting(None, integer(1), "tokens to generate, at most", metavar="N")
    temperature: float | None = setting(None, number(0, 2), "0 always takes the likeliest token", metavar="T")
    top_p: float | None = setting(None, _share, "keep the likeliest tokens up to this probability", metavar="P")
    top_k: int | None = setting(None, integer(0), "keep the K likeliest tokens; 0 keeps all", metavar="K")
    system: str | None = setting(None, text, "system prompt of a chat", metavar="TEXT")


class Terminal:
    """An engine that runs while this process waits for an answer, and rests in between."""

    def __init__(self, engine: "AsyncEngine", config: TerminalConfig, runner: asyncio.Runner) -> None:
        self.engine = engine
        self._config = config
        self._runner = runner
        self._requests = 0

    def answer(self, prompt: Sequence[int], show: Callable[[str], object]) -> tuple[str, bool]:
        """Generate after ``prompt``, showing each piece. Ctrl-C stops it: (the text so far, whether it was complete).

        Raises:
            OctavoError: the engine does not take the prompt, or failed.
        """
        pieces: list[str] = []
        try:
            self._runner.run(self._stream(prompt, pieces, show))
        except KeyboardInterrupt:
            return "".join(pieces), False
        return "".join(pieces), True

    async def _stream(self, prompt: Sequence[int], pieces: list[str], show: Callable[[str], object]) -> None:
        self._requests += 1
        stream = self.engine.submit(prompt, self._params(), request_id=f"terminal-{self._requests}")
        try:
            async for output in stream:
                pieces.append(output.text)
                show(output.text)
        finally:
            stream.abort()

    def _params(self) -> SamplingParams:
        from server.sampling import with_defaults

        given = {name: getattr(self._config, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
        return SamplingParams(**with_defaults(given, self.engine.default_sampling))


@contextlib.contextmanager
def terminal(engine: "AsyncEngine", config: TerminalConfig) -> Iterator[Terminal]:
    """The engine, running."""
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        try:
            yield Terminal(engine, config, runner)
        finally:
            runner.run(engine.stop())


def show(piece: str) -> None:
    """Put a piece of text on standard output at once."""
    print(piece, end="", flush=True)


def standard_input() -> TextIO:
    """Standard input; bytes that are no text become U+FFFD there.

    Raises:
        ConfigError: it is closed.
    """
    if sys.stdin is None:
        raise ConfigError("standard input is closed")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin


def sound(words: str) -> str:
    """Text from the command line, with U+FFFD for bytes that are no text: Python passes those on as surrogates."""
    return re.sub("[\ud800-\udfff]", "\ufffd", words)
