"""Served requests to figures, tables and warnings."""

import pytest

from bench.forecast import cautions, comparison, forecast_of, samples_of, speed_of, table, table_of_tries
from scheduler.cluster import Cluster
from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.simulator import Arrival, Served


def _served(serial: int, arrival: float, first: float | None, last: float, tokens: int) -> Served:
    return Served(serial, arrival, prompt_tokens=3, first=first, last=last, output_tokens=tokens)


_TWO = [_served(0, 0.0, 1.0, 3.0, 5), _served(1, 1.0, 1.5, 1.5, 1)]


def test_times_are_those_of_the_load_test() -> None:
    assert samples_of(_TWO) == {"ttft": [1000.0, 500.0], "tpot": [500.0], "latency": [3000.0, 500.0]}
    speed = speed_of(_TWO, {})
    assert speed.ms["ttft"] is not None
    assert speed.ms["ttft"].p50 == 750.0
    assert (speed.requests, speed.failed, speed.goodput, speed.attained) == (2, 0, None, None)


def test_rates_are_over_the_time_to_the_last_token_and_of_the_whole_cluster() -> None:
    speed = speed_of(_TWO, {"ttft": 600.0}, share=0.5)
    assert speed.requests_per_s == 2 / 3 * 2
    assert speed.output_tokens_per_s == 6 / 3 * 2
    assert speed.goodput == pytest.approx(1 / 3 * 2)
    assert speed.attained == 0.5


def test_a_steady_rate_is_that_of_the_second_half_of_the_arrivals() -> None:
    """41 requests, one a second, 10 s each: 20 end in the second half, though the last ends at 50."""
    served = [_served(index, float(index), index + 1.0, index + 10.0, 2) for index in range(41)]
    speed = speed_of(served, {"latency": 10_000.0}, steady=True)
    assert (speed.requests_per_s, speed.output_tokens_per_s, speed.goodput) == (1.0, 2.0, 1.0)
    assert speed_of(served, {}).requests_per_s == pytest.approx(41 / 50)
    assert speed_of(_TWO, {}, steady=True).requests_per_s == 2 / 3, "too few to tell"


def test_what_timed_out_counts_as_failed_and_meets_no_objective() -> None:
    speed = speed_of([*_TWO, _served(2, 0.0, None, 2.0, 0)], {"ttft": 5000.0})
    assert (speed.requests, speed.failed, speed.attained) == (2, 1, pytest.approx(2 / 3))


def test_nothing_served_is_no_error() -> None:
    speed = speed_of([], {"ttft": 1.0}, steady=True)
    assert (speed.requests_per_s, speed.attained, speed.ms["ttft"]) == (0.0, 0.0, None)
    assert "-" in comparison(speed, speed)


def test_the_table_has_a_column_for_each_number_of_replicas() -> None:
    load = [Arrival(time=0.0, prompt=6, output=2) for _ in range(4)]
    config = SchedulerConfig(num_blocks=32, block_size=4, max_num_seqs=1)
    outcomes = [Cluster(replicas, config, CostModel(base=1.0)).simulate(load) for replicas in (1, 4)]
    forecasts = [forecast_of(outcome, {"ttft": 1000.0}) for outcome in outcomes]
    lines = {line[:20].strip(): line[20:].split() for line in table(forecasts).splitlines()}
    assert lines["replicas"] == ["1", "4"]
    assert lines["objective met"] == ["25.0%", "100.0%"]
    assert lines["TTFT p50, ms"] == ["4,000", "1,000"]
    assert lines["TPOT p99, ms"] == ["1,000", "1,000"]
    assert lines["requests/s"] == ["0.50", "2.00"]
    assert lines["sequences per step"] == ["1.00", "1.00"]
    assert lines["replicas simulated"] == ["1", "4"]
    assert "timed out" not in lines
    rows = [line.split() for line in table_of_tries(forecasts, 0.9).splitlines()[2:]]
    assert [row[:3] for row in rows] == [["1", "no", "25.0%"], ["4", "yes", "100.0%"]]


def test_a_comparison_says_how_far_off_the_simulator_is() -> None:
    later = [_served(0, 0.0, 2.0, 4.0, 5), _served(1, 1.0, 2.0, 2.0, 1)]
    lines = {
        line[:16].strip(): line[16:].split()
        for line in comparison(speed_of(_TWO, {}), speed_of(later, {})).splitlines()
    }
    assert lines["TTFT mean, ms"] == ["750.0", "1,500", "+100.0%"]
    assert lines["TPOT p50, ms"] == ["500.0", "500.0", "+0.0%"]
    assert lines["requests/s"] == ["0.67", "0.50", "-25.0%"]


def test_a_load_that_is_not_kept_up_with_is_pointed_out() -> None:
    growing = [_served(index, float(index), index * 1.5 + 1, index * 1.5 + 2, 2) for index in range(100)]
    (caution,) = cautions(growing)
    assert caution.startswith("it does not keep up: the median TTFT was 19.5 s in the load's second quarter and 44.5 s")


def test_waits_that_differ_by_chance_are_not_pointed_out() -> None:
    assert cautions([_served(index, float(index), index * 1.01 + 1, index * 1.01 + 2, 2) for index in range(100)]) == []


def test_a_load_that_is_short_beside_its_answers_is_pointed_out() -> None:
    (caution,) = cautions([_served(index, float(index), index + 1.0, index + 30.0, 2) for index in range(100)])
    assert "a median latency of 30.0 s is long beside the 99.0 s" in caution
    assert cautions([_served(index, float(index), index + 1.0, index + 9.0, 2) for index in range(100)]) == []
    assert "percentiles are rough" in cautions(_TWO)[0]
