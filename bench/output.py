"""What the measuring commands share in showing and keeping their findings: a table, a JSON document, a file written."""

import argparse
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from bench.invocation import Declare, command_line, public_arguments
from bench.report import FORMAT_VERSION, machine, write_json
from engine.errors import ConfigError, OctavoError


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


def document(
    name: str,
    declare: Declare,
    args: argparse.Namespace,
    findings: Mapping[str, Any],
    *,
    group: str = "octavo bench",
    files: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The findings and how they came about, ready for JSON; ``files``: which flags name one, beside the report's."""
    arguments = public_arguments(declare, args, ("json", "plot", *files))
    return {
        "format": FORMAT_VERSION,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(name, declare, arguments, group=group),
        "arguments": arguments,
        "versions": {"octavo": metadata.version("octavo"), "python": platform.python_version()},
        "machine": machine(),
        **findings,
    }


def save(args: argparse.Namespace, contents: Mapping[str, Any], draw: Callable[[str], None]) -> None:
    """Write the files that were asked for. Raises OctavoError where one cannot be written."""
    if args.json:
        write(args.json, lambda path: write_json(path, contents))
    if args.plot:
        write(args.plot, draw)


def write(path: str, fill: Callable[[str], None]) -> None:
    """Write a file. A failure is an OctavoError, one line for the user, after the table that was already printed."""
    try:
        fill(path)
    except (OSError, ValueError) as error:
        raise OctavoError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    print(f"wrote {path}")
