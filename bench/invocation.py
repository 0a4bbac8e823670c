"""How a command was called, as its report may show it."""

import argparse
import shlex
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

Declare = Callable[[argparse.ArgumentParser], None]
"""A command's ``add_arguments``."""


def public_arguments(declare: Declare, args: argparse.Namespace, files: tuple[str, ...]) -> dict[str, Any]:
    """The values of a command's flags; ``files``, where they are given, appear without their folders."""
    shown = {name: getattr(args, name) for name in _defaults(declare)}
    return {**shown, **{name: PurePath(shown[name]).name for name in files if shown[name]}}


def command_line(name: str, declare: Declare, arguments: Mapping[str, Any], *, group: str = "octavo bench") -> str:
    """The shortest command of the group that does the same, from what `public_arguments` gave."""
    words = [*group.split(), name]
    defaults = _defaults(declare)
    for key, value in arguments.items():
        flag = key.replace("_", "-")
        if value == defaults[key]:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif str(value).startswith("-"):  # which argparse would take for another flag
            words.append(f"--{flag}={value}")
        else:
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{flag}", str(one)]
    return shlex.join(words)


def _defaults(declare: Declare) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    declare(parser)
    return vars(parser.parse_args([]))
