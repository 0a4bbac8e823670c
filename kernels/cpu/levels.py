"""Levels of the x86 instruction set, for libraries that are compiled on another machine than the one they run on.

The names are those of the x86-64 psABI; the highest add products of integers, and of bfloat16 pairs, for which it has
no names.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True)
class Level:
    """What a compiler is told, and what a CPU must have, as Linux names it in /proc/cpuinfo."""

    name: str
    machine: tuple[str, ...]
    needs: frozenset[str]


_V3: Final = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
_V4: Final = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

LEVELS: Final = (
    Level(
        "x86-64-v4-bf16",
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
        _V4 | {"avx512_vnni", "avx512_bf16"},
    ),
    Level("x86-64-v4-vnni", ("-march=x86-64-v4", "-mavx512vnni"), _V4 | {"avx512_vnni"}),
    Level("x86-64-v4", ("-march=x86-64-v4",), _V4),
    Level("x86-64-v3", ("-march=x86-64-v3",), _V3),
    Level("x86-64", ("-march=x86-64",), frozenset()),
)
"""The fastest first."""


def location(folder: Path, level: Level, digest: str) -> Path:
    """The library of a level, compiled from sources with that digest."""
    return folder / f"{level.name}-{digest}.so"


def find(folder: Path, digest: str, cpu_flags: str) -> Path | None:
    """The fastest library in the folder that a CPU with these flags can run; None if there is none."""
    has = set(cpu_flags.split())
    fitting = (location(folder, level, digest) for level in LEVELS if level.needs <= has)
    return next((path for path in fitting if path.exists()), None)
