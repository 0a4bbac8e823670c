"""The bar that says how far a measurement is."""

import sys
from typing import Never

from tqdm import tqdm


def progress(title: str, total: int, unit: str) -> "tqdm[Never]":
    """A bar on stderr; none when that is not a terminal."""
    return tqdm(total=total, desc=title, unit=unit, file=sys.stderr, disable=None, leave=False, mininterval=0.25)
