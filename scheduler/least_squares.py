"""Least squares with coefficients that are not negative, for a handful of columns.

A cost cannot be negative, and where two columns say nearly the same an unconstrained fit gives one of them a negative
coefficient to cancel the other's. The best non-negative solution is the ordinary one over some subset of the columns
(Lawson and Hanson 1974, *Solving Least Squares Problems*, ch. 23): with so few columns all subsets can be tried.
"""

from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement
from math import fsum
from operator import mul

_SINGULAR = 1e-10
"""A pivot smaller than this, of columns of length one, is rounding: the column adds nothing to those before it."""


def nonnegative(columns: Sequence[Sequence[float]], target: Sequence[float]) -> tuple[list[float], float]:
    """The coefficients (≥ 0, one per column) whose combination is nearest ``target``, and the squared distance."""
    lengths = [_dot(column, column) ** 0.5 or 1.0 for column in columns]
    # Columns of length one: pairs of tokens are millions where a constant is one, and the pivots must be comparable.
    gram = [[0.0] * len(columns) for _ in columns]
    for i, j in combinations_with_replacement(range(len(columns)), 2):
        gram[i][j] = gram[j][i] = _dot(columns[i], columns[j]) / (lengths[i] * lengths[j])
    moments = [_dot(column, target) / length for column, length in zip(columns, lengths, strict=True)]
    whole = _dot(target, target)
    best, least = [0.0] * len(columns), whole
    for size in range(1, len(columns) + 1):
        for chosen in combinations(range(len(columns)), size):
            found = _solve([[gram[i][j] for j in chosen] for i in chosen], [moments[i] for i in chosen])
            if found is None or min(found) < 0:
                continue
            error = whole - fsum(value * moments[i] for value, i in zip(found, chosen, strict=True))
            if error < least:
                best, least = [0.0] * len(columns), error
                for value, i in zip(found, chosen, strict=True):
                    best[i] = value / lengths[i]
    return best, max(least, 0.0)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return float(sum(map(mul, a, b)))


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Solve a symmetric positive definite system by Gaussian elimination; None if it is singular."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for index in range(size):
        if rows[index][index] < _SINGULAR:
            return None
        for below in range(index + 1, size):
            factor = rows[below][index] / rows[index][index]
            rows[below] = [b - factor * a for a, b in zip(rows[index], rows[below], strict=True)]
    solution = [0.0] * size
    for index in reversed(range(size)):
        known = sum([rows[index][j] * solution[j] for j in range(index + 1, size)])
        solution[index] = (rows[index][size] - known) / rows[index][index]
    return solution
