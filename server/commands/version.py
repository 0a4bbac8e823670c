"""`octavo version`."""

import argparse

from server.version import version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> int:
    """Print the version."""
    print(f"octavo {version()}")
    return 0
