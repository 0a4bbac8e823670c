"""What the measuring commands share in showing and keeping their findings: a table, a JSON document, a file written."""

import argparse
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import PurePath
from typing import Any

from bench.report import FORMAT_VERSION, write_json
from engine.errors import ConfigError, OctavoError

Declare = Callable[[argparse.ArgumentParser], None]
"""A command's ``add_arguments``."""


def add_arguments(parser: argparse.ArgumentParser, *, plot: str) -> None:
    """Declare --json and --plot; ``plot`` says what the picture shows."""
    group = parser.add_argument_group("report")
    group.add_argument("--json", metavar="FILE", help="write everything measured, with the command, as JSON")
    group.add_argument("--plot", metavar="FILE", help=f"draw {plot}")


def at_least(args: argparse.Namespace, least: float, *names: str) -> None:
    """Check that numeric settings are not below ``least``. Raises ConfigError, naming the flag."""
    for name in names:
        value = getattr(args, name)
        if not value >= least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least:g}, not {value:g}")


def whole_numbers(text: str, flag: str) -> list[int]:
    """A list such as ``64,256``: positive whole numbers, none twice. Raises ConfigError."""
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items or len(set(items)) < len(items):
        raise ConfigError(f"{flag} takes different numbers with commas between them, not {text!r}")
    for item in items:
        if not (item.isascii() and item.isdigit() and int(item) > 0):
            raise ConfigError(f"{flag} takes positive whole numbers, not {item!r}")
    return [int(item) for item in items]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right; a head may take several lines."""
    split = [name.split("\n") for name in head]
    height = max(map(len, split))
    tops = [[""] * (height - len(lines)) + lines for lines in split]
    everything = [*(list(line) for line in zip(*tops, strict=True)), *rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            f"{cell:{'<' if column == 0 else '>'}{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in everything
    )


def figure(value: float | None) -> str:
    """Three digits or so; a dash where there is no value."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def command_line(name: str, declare: Declare, args: argparse.Namespace) -> str:
    """The shortest command that does the same; files appear without their folders."""
    words = ["octavo", "bench", name]
    defaults = _defaults(declare)
    for key, value in _arguments(declare, args).items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool) and value != defaults[key]:
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value != defaults[key]:
            words += [flag, str(value)]
    return shlex.join(words)


def document(name: str, declare: Declare, args: argparse.Namespace, findings: Mapping[str, Any]) -> dict[str, Any]:
    """The findings and how they came about, ready for JSON."""
    return {
        "format": FORMAT_VERSION,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(name, declare, args),
        "arguments": _arguments(declare, args),
        "versions": {"octavo": metadata.version("octavo"), "python": platform.python_version()},
        "machine": {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count()},
        **findings,
    }


def save(args: argparse.Namespace, contents: Mapping[str, Any], draw: Callable[[str], None]) -> None:
    """Write the files that were asked for. Raises OctavoError where one cannot be written."""
    if args.json:
        _write(args.json, lambda path: write_json(path, contents))
    if args.plot:
        _write(args.plot, draw)


def _write(path: str, write: Callable[[str], None]) -> None:
    try:
        write(path)
    except (OSError, ValueError) as error:
        raise OctavoError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    print(f"wrote {path}")


def _defaults(declare: Declare) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    declare(parser)
    return vars(parser.parse_args([]))


def _arguments(declare: Declare, args: argparse.Namespace) -> dict[str, Any]:
    shown = {name: getattr(args, name) for name in _defaults(declare)}
    return {**shown, **{name: PurePath(shown[name]).name for name in ("json", "plot") if shown[name]}}
