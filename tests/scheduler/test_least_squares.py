"""Non-negative least squares, by the conditions that its solution alone satisfies."""

from math import isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.least_squares import nonnegative

_VALUES = st.integers(-6, 6).map(float)


@st.composite
def _problems(draw: st.DrawFn) -> tuple[list[list[float]], list[float]]:
    rows = draw(st.integers(1, 6))
    column = st.lists(_VALUES, min_size=rows, max_size=rows)
    return draw(st.lists(column, min_size=1, max_size=4)), draw(column)


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _residual(columns: list[list[float]], target: list[float], found: list[float]) -> list[float]:
    rows = range(len(target))
    return [target[row] - sum(c * column[row] for c, column in zip(found, columns, strict=True)) for row in rows]


@given(_problems())
def test_no_change_that_is_allowed_comes_nearer(problem: tuple[list[list[float]], list[float]]) -> None:
    """The Karush-Kuhn-Tucker conditions, which are sufficient since the problem is convex."""
    columns, target = problem
    found, error = nonnegative(columns, target)
    left = _residual(columns, target, found)
    assert isclose(error, _dot(left, left), rel_tol=1e-9, abs_tol=1e-9)
    for value, column in zip(found, columns, strict=True):
        pull = _dot(column, left)
        assert value >= 0
        assert pull <= 1e-7, "a larger coefficient would be better"
        assert value == 0 or abs(pull) <= 1e-7, "a smaller coefficient would be better"


def test_known_coefficients_come_back_though_columns_differ_in_size_by_millions() -> None:
    columns = [[1.0, 1.0, 1.0, 1.0], [1e6, 2e6, 5e6, 9e6], [3e-6, 1e-6, 4e-6, 1e-6]]
    known = [2.0, 3e-6, 5e6]
    target = [sum(c * column[row] for c, column in zip(known, columns, strict=True)) for row in range(4)]
    found, error = nonnegative(columns, target)
    assert all(isclose(a, b, rel_tol=1e-6) for a, b in zip(found, known, strict=True))
    assert error < 1e-9


def test_a_coefficient_that_would_be_negative_is_zero() -> None:
    found, error = nonnegative([[1.0, 1.0], [0.0, 1.0]], [3.0, 1.0])
    assert found == pytest.approx([2.0, 0.0])
    assert error == pytest.approx(2.0)


def test_of_two_equal_columns_one_has_it_all() -> None:
    found, error = nonnegative([[1.0, 2.0], [1.0, 2.0]], [2.0, 4.0])
    assert sorted(found) == pytest.approx([0.0, 2.0])
    assert error == pytest.approx(0.0, abs=1e-12)


def test_a_column_of_zeros_gets_nothing() -> None:
    assert nonnegative([[0.0, 0.0]], [1.0, 2.0]) == ([0.0], 5.0)
