"""`octavo bench`: the group of measuring commands.

A command module exposes ``add_arguments(parser)`` and ``run(args) -> int`` and is imported only when it is
the one asked for, so that no command pays for another's imports. Adding a command is adding a line to
``COMMANDS``.
"""

import argparse
import importlib
import sys
from dataclasses import dataclass
from typing import Protocol, cast

from engine.errors import OctavoError


class CommandModule(Protocol):
    """What every command module exposes."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


@dataclass(frozen=True, slots=True)
class Command:
    """A line of the group's table: the name typed, where its module is, and what `--help` says of it."""

    name: str
    module: str
    help: str


COMMANDS = (
    Command("serve", "bench.serve", "load-test an OpenAI-compatible server: throughput, TTFT, TPOT, ITL, goodput"),
    Command("step", "bench.step", "show where the time of one model step goes, op by op, beside its floor"),
    Command("ceiling", "bench.ceiling", "measure how many tokens/s the load-test client itself can receive"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the group: a command's name, and everything after it left for that command's own parser."""
    width = max(len(command.name) for command in COMMANDS)
    listing = "\n".join(f"  {command.name:<{width}}  {command.help}" for command in COMMANDS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = f"{parser.prog} [-h] COMMAND ..."
    parser.epilog = f"commands:\n{listing}\n\n`{parser.prog} COMMAND --help` lists a command's options."
    names = [command.name for command in COMMANDS]
    parser.add_argument("bench_command", metavar="COMMAND", choices=names, help=argparse.SUPPRESS)
    # The remainder, rather than sub-parsers: those would need every command's arguments, hence its import.
    parser.add_argument("bench_arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(bench_prog=parser.prog)


def run(args: argparse.Namespace) -> int:
    """Run the chosen command; returns the process's exit code (2 for settings that cannot work)."""
    command = next(command for command in COMMANDS if command.name == args.bench_command)
    module = cast(CommandModule, importlib.import_module(command.module))
    parser = argparse.ArgumentParser(
        prog=f"{args.bench_prog} {command.name}", description=command.help, allow_abbrev=False
    )
    module.add_arguments(parser)
    try:
        return module.run(parser.parse_args(args.bench_arguments))
    except OctavoError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
