"""The least number that is enough: by steps that double, then by bisection."""

from collections.abc import Callable

_FIRST_STEP = 8
"""The first step is this part of the start."""


def least(
    enough: Callable[[int], bool], start: int, most: int, grain: Callable[[int], int] = lambda _: 1
) -> int | None:
    """The least n from 1 to ``most`` that is ``enough``, provided that a number above one that is enough is enough too.

    The nearer ``start`` is, the fewer numbers are looked at; none is looked at twice. None if not even ``most`` is
    enough. ``grain(n)`` says how much too large an answer of n may be, less 1: with 1 the answer is exact.
    """
    high = min(max(start, 1), most)
    step = max(1, high // _FIRST_STEP)
    if enough(high):
        low = max(high - step, 0)
        while low and enough(low):
            step *= 2
            high, low = low, max(low - step, 0)
    else:
        low = high
        while True:
            if low == most:
                return None
            high = min(low + step, most)
            if enough(high):
                break
            step *= 2
            low = high
    while high - low > grain(high):
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high
