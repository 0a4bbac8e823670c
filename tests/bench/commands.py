"""A measuring command as a test runs it: from its flags to its JSON document, on servers that are all one fake."""

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig, load
from engine.errors import ConfigError
from server.command_table import CommandModule
from server.commands import serve
from tests.bench.fake_openai import FakeServer


def parse(command: CommandModule, *given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(given))


def refuses(command: CommandModule, given: Sequence[str]) -> bool:
    """Whether the command is refused in one line that begins with the first of its flags."""
    with pytest.raises(ConfigError) as caught:
        command.run(parse(command, *given))
    message = str(caught.value)
    return message.startswith(f"{given[0]} ") and "\n" not in message


def settings(serve_flags: Sequence[str]) -> EngineConfig:
    """What `octavo serve` makes of its flags. Raises ConfigError or SystemExit where it makes nothing of them."""
    return load(EngineConfig, vars(parse(serve, *serve_flags)), environ={})


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    report: Any
    started: list[list[str]]
    """The flags of every server that it would have started."""


@dataclass(frozen=True)
class Bench:
    """A command whose servers are ``fake``, and the folder that it writes to."""

    command: CommandModule
    small: Sequence[str]
    """Flags that every run has, and that keep it short."""
    fake: FakeServer
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def run(self, *given: str, plot: bool = False) -> Outcome:
        """Run it, with --json and perhaps --plot; the command that its report tells must do the same."""
        started: list[list[str]] = []

        @contextmanager
        def local_server(serve_flags: Sequence[str], port: int = 0) -> Iterator[str]:
            started.append(list(serve_flags))
            yield self.fake.url

        self.monkeypatch.setattr("bench.local_server.local_server", local_server)
        files = {"json": self.folder / "report.json", **({"plot": self.folder / "plot.svg"} if plot else {})}
        named = [word for flag, path in files.items() for word in (f"--{flag}", str(path))]
        args = parse(self.command, *self.small, *given, *named)
        code = self.command.run(args)
        report = json.loads(files["json"].read_text())
        again = parse(self.command, *shlex.split(report["command"])[3:])
        assert vars(again) == {**vars(args), **{flag: path.name for flag, path in files.items()}}
        return Outcome(code, report, started)

    @property
    def drawn(self) -> str:
        """The plot; its texts are its comments."""
        return (self.folder / "plot.svg").read_text()
