"""`octavo generate`."""

import argparse

from engine.config import EngineConfig, add_flags, load_all
from engine.errors import ConfigError
from server.commands.terminal import TerminalConfig, show, sound, standard_input, terminal
from server.config import ServerConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The prompt, the sampling, the model."""
    parser.add_argument("--prompt", metavar="TEXT", help="what to continue; standard input by default")
    add_flags(parser.add_argument_group("sampling"), TerminalConfig)
    add_flags(parser.add_argument_group("the model"), EngineConfig)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings (OCTAVO_CONFIG)")


def run(args: argparse.Namespace) -> int:
    """Stream the continuation to standard output."""
    # ServerConfig is among them so that one file can serve all commands.
    engine_config, config, _ = load_all((EngineConfig, TerminalConfig, ServerConfig), vars(args))
    prompt = _read() if args.prompt is None else sound(args.prompt)

    from engine.launch import load_engine

    engine = load_engine(engine_config)
    ids = engine.tokenizer.encode(prompt)
    if not ids:
        raise ConfigError("--prompt: there is nothing to continue")
    with terminal(engine, config) as console:
        _, complete = console.answer(ids, show)
    print()
    return 0 if complete else 130


def _read() -> str:
    stdin = standard_input()
    if stdin.isatty():
        raise ConfigError("--prompt: say what to continue, or give it on standard input")
    return stdin.read()
