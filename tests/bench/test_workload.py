"""Loads that are made up, and loads that are read."""

import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

from bench.workload import SyntheticLoad, moved, parse_lengths, random_moments, read_jsonl
from engine.errors import ConfigError
from scheduler.simulator import Arrival


def _load(count: int, **changed: Any) -> SyntheticLoad:
    fields: dict[str, Any] = {
        "moments": random_moments(count, 1.0, "s"),
        "rate": 4.0,
        "inputs": parse_lengths("uniform:10:30", "--input-len"),
        "outputs": parse_lengths("lognormal:40:0.5", "--output-len"),
        "seed": "s",
    }
    return SyntheticLoad(**{**fields, **changed})


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("7", [7, 7, 7]),
        ("uniform:1:4", [1, 3, 4]),
        ("lognormal:100:0", [100, 100, 100]),
        ("lognormal:100:1", [10, 100, 1024]),
        ("lognormal:100:1:300", [10, 100, 300]),
        ("lognormal:2:9", [1, 2, 1 << 24]),
    ],
)
def test_lengths_follow_their_distribution(text: str, lengths: list[int]) -> None:
    parsed = parse_lengths(text, "--input-len")
    low, high = 0.01, 0.99
    assert [parsed.at(share) for share in (low, 0.5, high)] == lengths


def test_uniform_lengths_are_equally_frequent() -> None:
    lengths = parse_lengths("uniform:3:5", "--input-len")
    counts = [sum(lengths.at((index + 0.5) / 300) == length for index in range(300)) for length in (3, 4, 5)]
    assert counts == [100, 100, 100]


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "0", "-3", "1.5", "nan", "inf", str(1 << 25), "fixed:1:2", "zipf:1:2"),
        *("uniform:1", "uniform:5:4", "uniform:1:2:3", "uniform:0:2"),
        *("lognormal:100", "lognormal:0:1", "lognormal:100:-1", "lognormal:100:nan", "lognormal:100:inf"),
        "lognormal:100:1:0",
    ],
)
def test_lengths_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--output-len takes a number of tokens, uniform:LOW:HIGH or"):
        parse_lengths(text, "--output-len")


def test_a_request_is_the_same_whenever_it_is_asked_for() -> None:
    load, shorter = _load(50), _load(20)
    assert load[13] == load[13] == shorter[13]
    assert load[13].prompt != load[14].prompt or load[13].output != load[14].output
    assert _load(50, seed="t")[13] != load[13]


def test_requests_come_at_the_rate_and_have_the_lengths_that_were_asked_for() -> None:
    load = _load(4000)
    arrivals = [load[index] for index in range(len(load))]
    assert arrivals[0].time == 0
    assert arrivals[-1].time == pytest.approx(1000, rel=0.05)
    assert mean(arrival.prompt for arrival in arrivals if isinstance(arrival.prompt, int)) == pytest.approx(
        20, rel=0.02
    )
    outputs = [arrival.output for arrival in arrivals if isinstance(arrival.output, int)]
    assert median(outputs) == pytest.approx(40, rel=0.05)
    assert mean(outputs) == pytest.approx(40 * math.exp(0.125), rel=0.05)
    assert {arrival.prefix for arrival in arrivals} == {None}


def test_each_prefix_is_equally_frequent() -> None:
    load = _load(3000, prefixes=3, prefix_tokens=7)
    prefixes = [load[index].prefix for index in range(3000)]
    assert all(abs(prefixes.count(prefix) - 1000) < 100 for prefix in range(3))
    assert load[0].prefix_tokens == 7


def test_bursty_gaps_vary_more() -> None:
    def variation(burstiness: float) -> float:
        moments = random_moments(4000, burstiness, "s")
        gaps = [later - earlier for earlier, later in pairwise(moments)]
        return math.sqrt(mean(gap * gap for gap in gaps) - mean(gaps) ** 2) / mean(gaps)

    assert variation(1.0) == pytest.approx(1.0, abs=0.1)
    assert variation(0.25) == pytest.approx(2.0, abs=0.2)


def _file(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_recorded_requests_are_sorted_and_begin_at_zero(tmp_path: Path) -> None:
    file = _file(
        tmp_path / "load.jsonl",
        {"time": 12.5, "prompt_tokens": 30, "output_tokens": 4, "prefix": 2, "prefix_tokens": 10, "tenant": "x"},
        {"time": 10, "prompt_tokens": 5, "output_tokens": 1, "priority": -1},
    )
    assert read_jsonl(file) == [
        Arrival(time=0.0, prompt=5, output=1, priority=-1),
        Arrival(time=2.5, prompt=20, output=4, prefix=2, prefix_tokens=10, tenant="x"),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "line 1: a request is a JSON object"),
        ({"time": 0, "prompt_tokens": 3}, "line 1: output_tokens is None, not a whole number from 1 to"),
        ({"time": "0", "prompt_tokens": 3, "output_tokens": 1}, "time is '0', not a number of seconds"),
        ({"time": math.inf, "prompt_tokens": 3, "output_tokens": 1}, "time is inf, not a number of seconds"),
        ({"time": 0, "prompt_tokens": 0, "output_tokens": 1}, "prompt_tokens is 0, not a whole number from 1"),
        ({"time": 0, "prompt_tokens": 3, "output_tokens": True}, "output_tokens is True"),
        ({"time": 0, "prompt_tokens": 3, "output_tokens": 1, "prefix": -1}, "prefix is -1"),
        (
            {"time": 0, "prompt_tokens": 3, "output_tokens": 1, "prefix": 0, "prefix_tokens": 4},
            "prefix_tokens is 4, more than the 3 of the whole prompt",
        ),
        ({"time": 0, "prompt_tokens": 3, "output_tokens": 1, "tenant": 3}, "tenant is 3, not a text"),
        ({"time": 0, "tokens": 3}, "a request has no 'tokens', but time, prompt_tokens, output_tokens, prefix,"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_jsonl(_file(tmp_path / "load.jsonl", entry))


def test_a_file_without_requests_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "broken").write_text("\n{")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, message in (
        ("empty", "holds no requests"),
        ("broken", "line 2: is not valid JSON"),
        ("binary", "is no text"),
        ("missing", "cannot be read: No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_jsonl(tmp_path / name)


def test_a_load_can_be_played_faster() -> None:
    arrivals = [Arrival(time=4.0, prompt=1, output=1), Arrival(time=6.0, prompt=1, output=1)]
    assert [arrival.time for arrival in moved(arrivals, start=4.0, speed=4.0)] == [0.0, 0.5]
