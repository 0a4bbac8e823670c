"""A line of a table of commands: `octavo`'s own, and those of a group such as `octavo bench`."""

import argparse
import importlib
from typing import NamedTuple, Protocol, cast


class CommandModule(Protocol):
    """What a command's module offers. Importing it must be cheap: what is heavy is imported by ``run``."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's flags."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; the result is the exit code."""


class Command(NamedTuple):
    """What `--help` says of a command, and where its module is: imported only when it is the one asked for."""

    help: str
    module: str

    def load(self) -> CommandModule:
        """Import the module."""
        return cast(CommandModule, importlib.import_module(self.module))
