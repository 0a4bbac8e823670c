"""The search for the least number that is enough."""

from hypothesis import example, given
from hypothesis import strategies as st

from bench.capacity import least


def _exact(_: int) -> int:
    return 1


@given(answer=st.integers(1, 300), start=st.integers(-5, 400), most=st.integers(1, 300))
@example(answer=1, start=100, most=200)
@example(answer=200, start=1, most=200)
def test_the_least_number_is_found_from_wherever_the_search_starts(answer: int, start: int, most: int) -> None:
    tried: list[int] = []

    def enough(number: int) -> bool:
        tried.append(number)
        return number >= answer

    assert least(enough, start, most, _exact) == (answer if answer <= most else None)
    assert len(set(tried)) == len(tried), "none is tried twice"
    assert all(1 <= number <= most for number in tried)


@given(answer=st.integers(1, 100_000), start=st.integers(1, 100_000), part=st.integers(1, 200))
def test_a_coarse_answer_is_enough_and_too_large_by_less_than_the_grain(answer: int, start: int, part: int) -> None:
    def grain(number: int) -> int:
        return max(1, number // part)

    found = least(lambda number: number >= answer, start, 100_000, grain)
    assert found is not None
    assert answer <= found < answer + grain(found)


def test_a_good_guess_saves_tries() -> None:
    def tries(start: int) -> int:
        tried: list[int] = []
        least(lambda number: not tried.append(number) and number >= 5000, start, 1_000_000, _exact)  # type: ignore[func-returns-value]
        return len(tried)

    assert tries(5000) <= 12
    assert tries(4400) <= 14
    assert tries(1) <= 26
