"""What the measuring commands share in showing and keeping their findings: a table, a JSON document, a file written."""

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.extras import require
from bench.invocation import Declare, command_line, public_arguments
from engine.errors import ConfigError, OctavoError

FORMAT_VERSION = 1
INTERRUPTED = 130
"""The exit code after Ctrl-C."""


def add_arguments(parser: argparse.ArgumentParser, *, plot: str) -> argparse._ArgumentGroup:
    """Declare --json and --plot; ``plot`` says what the picture shows. Returns their group, for more flags."""
    group = parser.add_argument_group("report")
    group.add_argument("--json", metavar="FILE", help="write everything measured, with the command, as JSON")
    group.add_argument("--plot", metavar="FILE", help=f"draw {plot}")
    return group


def check(args: argparse.Namespace) -> None:
    """Find out before an hour's measuring whether its findings can be kept. Raises ConfigError, naming the flag."""
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        folder = Path(path or "").absolute().parent
        if not folder.is_dir():
            raise ConfigError(f"{flag} {path}: there is no folder {folder}")
    if args.plot:
        require("matplotlib")
        from bench.figures import formats

        ending = Path(args.plot).suffix.removeprefix(".").lower()
        if ending not in formats():
            raise ConfigError(f"--plot {args.plot}: the name must end in one of {', '.join(formats())}")


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


def annotated(table: str, notes: Sequence[str]) -> str:
    """A table, and lines below it if there are any."""
    return "\n".join([table, *([""] if notes else []), *notes])


def stacked(label: str) -> str:
    """A policy's label in several lines, two words in each, for the axis of a picture."""
    words = label.split()
    return "\n".join(" ".join(words[start : start + 2]) for start in range(0, len(words), 2))


def figure(value: float | None) -> str:
    """Three digits or so; a dash where there is no value."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def circumstances(command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """How and when findings came about, ready for JSON."""
    return {
        "format": FORMAT_VERSION,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "arguments": dict(arguments),
        "versions": {
            "octavo": _version("octavo"),
            "aiohttp": _version("aiohttp"),
            "python": platform.python_version(),
        },
    }


def document(
    name: str,
    declare: Declare,
    args: argparse.Namespace,
    findings: Mapping[str, Any],
    *,
    group: str = "octavo bench",
    files: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The findings of a command that runs where the server does, and how they came about, ready for JSON.

    ``files``: which flags name one, beside the report's.
    """
    arguments = public_arguments(declare, args, ("json", "plot", *files))
    command = command_line(name, declare, arguments, group=group)
    return {**circumstances(command, arguments), "machine": machine(), **findings}


def machine() -> dict[str, Any]:
    """Where this runs."""
    return {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def save(args: argparse.Namespace, contents: Mapping[str, Any], draw: Callable[[str], None]) -> None:
    """Write the files that were asked for. Raises OctavoError where one cannot be written."""
    if args.json:
        write(args.json, lambda path: _write_json(path, contents))
    if args.plot:
        write(args.plot, draw)


def write(path: str, fill: Callable[[str], None]) -> None:
    """Write a file. A failure is an OctavoError, one line for the user, after the table that was already printed."""
    try:
        fill(path)
    except (OSError, ValueError) as error:
        raise OctavoError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    print(f"wrote {path}")


def _write_json(path: str, contents: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(contents, file, indent=2)
        file.write("\n")
