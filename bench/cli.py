"""`octavo bench`: the group of measuring commands.

Adding a command is adding a line to ``COMMANDS``, and a module with the two functions of `CommandModule`.
"""

import argparse
import sys

from engine.errors import OctavoError
from server.command_table import Command

COMMANDS = {
    "serve": Command("load-test an OpenAI-compatible server: throughput, TTFT, TPOT, ITL, goodput", "bench.serve"),
    "step": Command("show where the time of one model step goes, op by op, beside its floor", "bench.step"),
    "batching": Command("compare batching modes, none to continuous, under one load", "bench.batching"),
    "chat": Command("measure each turn of conversations, with and without prefix caching", "bench.chat"),
    "quality": Command("measure what each KV policy costs in quality, by perplexity and by answers", "bench.quality"),
    "kv": Command("measure what KV policies save in time and in memory", "bench.kv_speed"),
    "stall": Command("measure what a long prompt does to running streams, by token budget", "bench.stall"),
    "scheduler": Command("time the scheduler's steps and weigh the KV memory it leaves empty", "bench.scheduler"),
    "ceiling": Command("measure how many tokens/s the load-test client itself can receive", "bench.ceiling"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the group: a command's name, and everything after it left for that command's own parser."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = f"{parser.prog} [-h] COMMAND ..."
    parser.epilog = f"commands:\n{listing}\n\n`{parser.prog} COMMAND --help` lists a command's options."
    parser.add_argument("bench_command", metavar="COMMAND", choices=list(COMMANDS), help=argparse.SUPPRESS)
    # The remainder, rather than sub-parsers: those would need every command's arguments, hence its import.
    parser.add_argument("bench_arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(bench_prog=parser.prog)


def run(args: argparse.Namespace) -> int:
    """Run the chosen command; returns the process's exit code (2 for settings that cannot work)."""
    name = args.bench_command
    command = COMMANDS[name]
    module = command.load()
    parser = argparse.ArgumentParser(prog=f"{args.bench_prog} {name}", description=command.help, allow_abbrev=False)
    module.add_arguments(parser)
    try:
        return module.run(parser.parse_args(args.bench_arguments))
    except OctavoError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
