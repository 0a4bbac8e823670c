"""The time of a step by its work, and the fit that finds it from measured steps."""

from dataclasses import asdict, replace
from random import Random

import pytest

from scheduler.cost_model import CostModel, Observation, Work

_KNOWN = CostModel(
    base=2e-3,
    per_token=3e-5,
    knee=100.0,
    per_context_token=6e-8,
    per_pair=1e-9,
    per_sample=1e-6,
    per_moved_token=5e-7,
)


def _works(count: int) -> list[Work]:
    """Steps of decoding, of prefill, and of both."""
    source = Random(7)
    works = []
    for index in range(count):
        decoding = [(source.randrange(2000), 1, 1) for _ in range(source.randrange(60))]
        prefill = [(source.randrange(500), source.randint(2, 500), source.randint(0, 1))] if index % 3 == 0 else []
        works.append(Work.of([*decoding, *prefill, (10, 1, 1)], moved=16 * source.randrange(5)))
    return works


def test_the_work_of_a_step_is_counted_over_its_sequences() -> None:
    decoding, chunk = (7, 1, 1), (4, 3, 0)
    # The chunk's tokens, at positions 4, 5 and 6, attend to 5, 6 and 7 tokens.
    assert Work.of([decoding, chunk], moved=32) == Work(tokens=4, context=8 + 7, pairs=8 + 18, samples=1, moved=32)


def test_a_step_takes_the_sum_of_its_parts_and_tokens_below_the_knee_are_free() -> None:
    cost = CostModel(
        base=1.0, per_token=2.0, knee=3, per_context_token=10.0, per_pair=100.0, per_sample=1e3, per_moved_token=1e4
    )
    assert cost.seconds(Work(tokens=5, context=1, pairs=2, samples=3, moved=4)) == 1 + 10 + 10 + 200 + 3000 + 40_000
    assert cost.seconds(Work(tokens=1, context=0, pairs=0, samples=0)) == 1 + 2 * 3


@pytest.mark.parametrize("knee", [0.0, 37.5, 100.0])
def test_a_fit_recovers_known_coefficients(knee: float) -> None:
    known = replace(_KNOWN, knee=knee)
    found = CostModel.fit([Observation(work, known.seconds(work)) for work in _works(100)], source="here")
    assert found.source == "here"
    for name, value in asdict(known).items():
        if name not in ("source", "knee"):
            assert getattr(found, name) == pytest.approx(value, rel=1e-3), name
    assert found.knee == pytest.approx(knee, abs=1.0), "one token at most is below this knee"


def test_a_fit_over_noise_is_right_on_the_whole() -> None:
    """Steps that take 1 or 3 s alike are said to take 2 s, and not what fits the reciprocals best."""
    work = Work(tokens=1, context=5, pairs=5, samples=1)
    found = CostModel.fit([Observation(work, seconds) for seconds in (1.0, 3.0) for _ in range(10)])
    assert found.seconds(work) == pytest.approx(2.0)


def test_long_steps_do_not_drown_short_ones() -> None:
    """A thousandfold step that is 20% off must not bend the short ones: errors count relative."""
    short, long = Work(1, 1, 1, 1), Work(1000, 1000, 1000, 1)
    steps = [Observation(short, 1e-3)] * 50 + [Observation(long, 0.8), Observation(long, 1.2)]
    assert CostModel.fit(steps).seconds(short) == pytest.approx(1e-3, rel=1e-6)


def test_a_fit_needs_steps_that_took_time() -> None:
    for steps in ([], [Observation(Work(1, 1, 1, 1), 0.0)]):
        with pytest.raises(ValueError, match="steps that took some time"):
            CostModel.fit(steps)


def test_of_many_steps_an_even_part_is_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.cost_model._MOST_FITTED", 11)
    steps = [Observation(Work(1, 1, 1, 1), 1.0 if index % 10 == 0 else 9.0) for index in range(101)]
    assert CostModel.fit(steps).seconds(Work(1, 1, 1, 1)) == pytest.approx(1.0)


def test_a_model_survives_its_file() -> None:
    assert CostModel.from_json(_KNOWN.to_json()) == _KNOWN
    assert CostModel.from_json('{"base": 0.25}') == CostModel(base=0.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a cost model is a JSON object"),
        ("{", "Expecting"),
        ("{}", "a step takes no time"),
        ('{"knee": 3}', "a step takes no time"),
        ('{"bass": 1}', "a cost model has no 'bass', but base, knee, per_context_token"),
        ('{"base": -1}', "a cost model's base is a number that is not negative, not -1"),
        ('{"base": true}', "base is a number that is not negative, not True"),
        ('{"base": 1, "knee": "x"}', "knee is a number that is not negative, not 'x'"),
        ('{"base": Infinity}', "base is a number that is not negative, not inf"),
        ('{"base": 1, "source": 3}', "source is text"),
    ],
)
def test_what_is_no_model_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostModel.from_json(text)
