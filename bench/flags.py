"""What flags may say: bounds and lists, checked in the same words everywhere. Each error is one line with the flag."""

import argparse
import math
import re

from engine.errors import ConfigError


def at_least(args: argparse.Namespace, least: float, *names: str) -> None:
    """Check that numbers are finite and not below ``least``; None is a flag not given.

    Raises ConfigError, naming the flag.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least:g}, not {value}")


def positive(args: argparse.Namespace, *names: str) -> None:
    """Check that numbers are finite and above 0. Raises ConfigError, naming the flag."""
    for name in names:
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive, not {value}")


def http_address(text: str, flag: str) -> None:
    """Check that an address is one of HTTP. Raises ConfigError."""
    if not text.startswith(("http://", "https://")):
        raise ConfigError(f"{flag} must begin with http:// or https://, not {text!r}")


def items(text: str, flag: str) -> list[str]:
    """The parts of a list like ``1,8,inf``: at least one, none twice. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"{flag} needs at least one value")
    if len(set(parts)) < len(parts):
        raise ConfigError(f"{flag} {text} names a value twice")
    return parts


def whole_number(text: str, flag: str, *, others: str = "") -> int:
    """A positive one of at most nine digits; ``others`` says what else the flag takes. Raises ConfigError."""
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise ConfigError(f"{flag} takes positive whole numbers{others}, not {text!r}")
    return int(text)


def whole_numbers(text: str, flag: str) -> list[int]:
    """A list such as ``64,256``. Raises ConfigError."""
    return [whole_number(part, flag) for part in items(text, flag)]
