"""The `octavo` command: a table of subcommands, each loaded only when it is the one asked for."""

import argparse
import sys
from collections.abc import Sequence

from engine.config import load
from engine.errors import ConfigError, OctavoError
from server.command_table import Command, CommandModule
from server.config import LogConfig

COMMANDS = {
    "serve": Command("serve a model over the OpenAI API", "server.commands.serve"),
    "chat": Command("talk with a model in the terminal", "server.commands.chat"),
    "generate": Command("continue one prompt on standard output", "server.commands.generate"),
    "bench": Command("measure a server under load", "bench.cli"),
    "simulate": Command("say what a load does to N replicas, or how many it needs", "bench.simulate"),
    "trace": Command("replay what `octavo serve --trace FILE` wrote, or fit costs to it", "bench.trace"),
    "version": Command("print the version", "server.commands.version"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit code: 2 for settings that cannot work, 1 for other failures."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "--version":
        argv = ["version", *argv[1:]]
    name = argv[0] if argv and argv[0] in COMMANDS else None
    parser, module = _parser(name)
    args = parser.parse_args(argv)
    if module is None:
        parser.print_help()
        return 2
    try:
        return module.run(args)
    except OctavoError as error:
        if _debugging(args):
            raise
        print(f"octavo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (`octavo generate … | head`) has seen enough. Standard output cannot be
        # flushed any more, and the interpreter would complain about that at exit.
        sys.stdout = None
        return 1


def _debugging(args: argparse.Namespace) -> bool:
    """Whether a failure is shown with its traceback."""
    try:
        return load(LogConfig, vars(args)).log_level == "debug"
    except ConfigError:
        return False


def _parser(name: str | None) -> tuple[argparse.ArgumentParser, CommandModule | None]:
    """The parser with one line per command; only the command ``name`` is loaded and gets its flags."""
    parser = argparse.ArgumentParser(
        prog="octavo",
        description="Serve language models over the OpenAI API, from a shared, paged KV cache.",
        epilog="`octavo COMMAND --help` lists a command's flags.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", title="commands")
    module = None
    for key, command in COMMANDS.items():
        line = command.help
        description = f"{line[0].upper()}{line[1:]}."
        subparser = subparsers.add_parser(key, help=line, description=description, allow_abbrev=False)
        if key == name:
            module = command.load()
            module.add_arguments(subparser)
    return parser, module


if __name__ == "__main__":
    sys.exit(main())
