"""What a setting may be: parsers from a flag's text, a YAML or a Python value to the field's."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Parser = Callable[[object], Any]
"""Idempotent; raises ValueError, saying what is wanted."""


def text(value: object) -> str:
    """Any non-empty text."""
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        raise ValueError("expected some text")
    return str(value)


def path(value: object) -> Path:
    """A path; `~` stands for the home folder."""
    try:
        return Path(text(value)).expanduser()
    except RuntimeError as error:
        raise ValueError(f"expected a path; {str(error).rstrip('.').lower()}") from None


def integer(minimum: int, maximum: int | None = None) -> Parser:
    """A whole number within bounds (both inclusive)."""
    wanted = f"a whole number of at least {minimum}" if maximum is None else f"a whole number, {minimum} to {maximum}"

    def parse(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,30}\s*", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"expected {wanted}")
        if value < minimum or (maximum is not None and value > maximum):
            raise ValueError(f"expected {wanted}")
        return value

    return parse


def number(minimum: float, maximum: float) -> Parser:
    """A number within bounds (both inclusive)."""

    def parse(value: object) -> float:
        try:
            result = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
        except (ValueError, OverflowError):
            result = None
        if result is None or not minimum <= result <= maximum:
            raise ValueError(f"expected a number, {minimum:g} to {maximum:g}")
        return result

    return parse


def boolean(value: object) -> bool:
    """true/false, also written yes/no, on/off, 1/0."""
    words = {
        "true": True,
        "yes": True,
        "on": True,
        "1": True,
        "false": False,
        "no": False,
        "off": False,
        "0": False,
    }
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise ValueError("expected true or false")


def choice(*names: str) -> Parser:
    """One of a few words."""

    def parse(value: object) -> str:
        if value not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return str(value)

    return parse


def texts(value: object) -> tuple[str, ...]:
    """Several texts: a flag given more than once, a YAML list, or one text with commas."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, Sequence) or not all(isinstance(item, str) for item in given):
        raise ValueError("expected text, or a list of texts")
    return tuple(part.strip() for item in given for part in item.split(",") if part.strip())


def memory(value: object) -> int:
    """Bytes: a whole number, or a number and a unit (kB, MB: powers of 1000; K, KiB, M, MiB: of 1024)."""
    if isinstance(value, str):
        digits = value.strip().rstrip("BbiKkMmGgTt ")
        unit = value.strip()[len(digits) :].strip().lower()
        scale = {"": 1, "b": 1}
        for power, letter in enumerate("kmgt", start=1):
            scale |= {letter: 1024**power, f"{letter}ib": 1024**power, f"{letter}b": 1000**power}
        try:
            value = int(float(digits) * scale[unit])
        except (ValueError, KeyError, OverflowError):
            value = None
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError("expected an amount of memory such as 2GiB")
    return value
