"""What a trace says was served, and how long its steps took."""

import json
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from scheduler.cluster import Cluster
from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel, Observation, Work
from scheduler.recording import read_recording
from scheduler.simulator import Arrival, Served
from scheduler.trace import TraceError
from scheduler.waiting_queue import Order
from tests.scheduler.simulated_traces import write_trace

_HEAD = {"version": 1, "config": {"num_blocks": 9, "block_size": 4, "batching": {}, "order": {}}}


def _add(now: float | str, name: str = "a", **more: Any) -> dict[str, Any]:
    stop = {"max_tokens": 9, "min_tokens": 0, "stop_token_ids": [5]}
    described = {"id": name, "prompt": [1, 2, 3], "root": "00", "stop": stop, "n": 1, "beam_width": None}
    return {"now": now, "add": {**described, "priority": 0, "tenant": "", "deadline": None, **more}}


def _step(now: float, *items: list[Any], **transfers: list[list[int]]) -> dict[str, Any]:
    return {"now": now, "step": {"items": list(items), **transfers}}


def _file(path: Path, entries: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [_HEAD, *entries]))
    return path


def test_what_the_simulator_writes_reads_back_as_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole circle: served with a known cost, traced, read, fitted, and simulated again to the same times."""
    source = Random(5)
    config = SchedulerConfig(
        num_blocks=24,
        num_host_blocks=12,
        block_size=4,
        max_num_seqs=5,
        max_num_batched_tokens=12,
        order=Order(policy="priority"),
    )
    cost = CostModel(base=0.25, per_token=0.125, knee=4, per_context_token=0.015625, per_moved_token=0.03125)
    arrivals = [
        Arrival(
            time=index * 0.75,
            prompt=array("i", source.choices(range(3), k=source.randint(1, 25))),
            output=array("i", source.choices(range(9), k=source.randint(1, 12))),
            cache_salt=source.choice([None, "x"]),
            priority=source.randrange(3),
        )
        for index in range(60)
    ]
    replica = write_trace(tmp_path / "trace", config, cost, arrivals, monkeypatch)
    assert replica.scheduler.counters.preemptions > 0
    recording = read_recording(tmp_path / "trace")
    assert recording.config == config
    assert [replace(arrival, cache_salt=None) for arrival in recording.arrivals] == [
        replace(arrival, cache_salt=None) for arrival in arrivals
    ]
    assert recording.served == sorted(replica.served, key=lambda served: served.serial)
    assert recording.left_out == 0
    assert len(recording.steps) == replica.tally.steps
    assert sum(seconds for _, seconds in recording.steps) == pytest.approx(replica.tally.busy)
    fitted = CostModel.fit(recording.steps)
    assert all(fitted.seconds(work) == pytest.approx(seconds, rel=1e-6) for work, seconds in recording.steps)
    again = Cluster(1, recording.config, cost).simulate(recording.arrivals)
    assert again.served == replica.served


def test_a_step_lasts_to_the_next_or_to_its_tokens_where_none_follows_at_once(tmp_path: Path) -> None:
    entries = [
        _add(10.0),
        _step(10.5, ["a", 0, 0, 3, 1]),
        {"update": [[7]], "seconds": 0.25},
        _step(11.0, ["a", 0, 3, 1, 1], out=[[1, 2]], back=[[3, 4], [4, 5]]),
        {"update": [[5]], "seconds": 0.125},  # 5 stops: the server is idle now
        _add(20.0, "b"),
        _step(20.5, ["b", 0, 0, 3, 1]),
        {"update": [[5]], "seconds": 0.75},
    ]
    recording = read_recording(_file(tmp_path / "trace", entries))
    assert recording.steps == [
        Observation(Work(tokens=3, context=3, pairs=6, samples=1), 0.5),
        Observation(Work(tokens=1, context=4, pairs=4, samples=1, moved=12), 0.125),
        Observation(Work(tokens=3, context=3, pairs=6, samples=1), 0.75),
    ]
    assert recording.served == [
        Served(0, arrival=0.0, prompt_tokens=3, first=1.0, last=1.125, output_tokens=2),
        Served(1, arrival=10.0, prompt_tokens=3, first=11.25, last=11.25, output_tokens=1),
    ]
    assert [list(arrival.output) for arrival in recording.arrivals if not isinstance(arrival.output, int)] == [
        [7, 5],
        [5],
    ]


def test_who_leaves_early_counts_with_what_it_got_and_who_got_nothing_is_left_out(tmp_path: Path) -> None:
    entries = [
        _add(0.0, "gone"),
        _add(0.0, "stopped"),
        _add(0.0, "late"),
        _add(0.0, "aborted"),
        _step(1.0, ["gone", 0, 0, 3, 1], ["stopped", 0, 0, 3, 1]),
        {"abort": "gone"},
        {"update": [[7], [7]], "seconds": 0.5},
        {"now": 2.0, "expire": ["late"]},
        _step(2.0, ["stopped", 0, 3, 1, 1], ["aborted", 0, 0, 3, 1]),
        {"update": [[7], [7]], "seconds": 0.5},
        {"finish": ["stopped", 0, "stop"]},
        {"abort": "aborted"},
        {"abort": "aborted"},
        _add(9.0, "unfinished"),
        _step(9.0, ["unfinished", 0, 0, 2, 0]),
        {"update": [[]], "seconds": 0.25},
    ]
    recording = read_recording(_file(tmp_path / "trace", entries))
    assert [(served.last, served.output_tokens) for served in recording.served] == [(2.5, 2), (2.5, 1)]
    assert recording.left_out == 3
    assert [seconds for _, seconds in recording.steps] == [1.0, 0.5, 0.25]


def test_the_server_is_idle_once_a_prompt_is_computed_that_is_all_that_was_wanted(tmp_path: Path) -> None:
    only_read = {"max_tokens": 0, "min_tokens": 0, "stop_token_ids": []}
    entries = [
        _add(0.0, "read", stop=only_read),
        _step(0.0, ["read", 0, 0, 2, 0]),
        {"update": [[]], "seconds": 0.5},
        _step(1.0, ["read", 0, 2, 1, 0]),
        {"update": [[]], "seconds": 0.25},
        _add(9.0, "a"),
        _step(9.0, ["a", 0, 0, 3, 1]),
        {"update": [[5]], "seconds": 0.5},
    ]
    recording = read_recording(_file(tmp_path / "trace", entries))
    assert [seconds for _, seconds in recording.steps] == [1.0, 0.25, 0.5]
    assert (len(recording.served), recording.left_out) == (1, 1)


def test_each_continuation_counts_as_a_request(tmp_path: Path) -> None:
    entries = [
        _add(0.0, n=2),
        _step(0.0, ["a", 0, 0, 3, 2]),
        {"update": [[7, 5]], "seconds": 0.5},  # the second ends with its first token
        {"finish": ["a", 1, "stop"]},  # and is told so again
        _step(1.0, ["a", 0, 3, 1, 1]),
        {"update": [[5]], "seconds": 0.5},
    ]
    recording = read_recording(_file(tmp_path / "trace", entries))
    assert [(served.first, served.last, served.output_tokens) for served in recording.served] == [
        (1.0, 1.5, 2),
        (1.0, 1.0, 1),
    ]
    assert [arrival.time for arrival in recording.arrivals] == [0.0, 0.0]


def test_a_later_request_may_have_the_name_of_one_that_has_ended(tmp_path: Path) -> None:
    once = [_step(0.0, ["a", 0, 0, 3, 1]), {"update": [[5]], "seconds": 0.5}]
    recording = read_recording(_file(tmp_path / "trace", [_add(0.0), *once, _add(0.0), *once]))
    assert len(recording.served) == 2


def test_tokens_found_in_a_cache_are_where_the_first_step_starts(tmp_path: Path) -> None:
    entries = [_add(0.0), _step(0.0, ["a", 0, 2, 1, 1]), {"update": [[5]], "seconds": 1.0}]
    assert read_recording(_file(tmp_path / "trace", entries)).served[0].cached_tokens == 2


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], ": no step in it has ended"),
        ([_add(0.0), _step(0.0, ["a", 0, 0, 3, 1])], ": no step in it has ended"),
        ([_add(0.0, beam_width=2)], "line 2: a beam search, which the simulator does not know"),
        ([{"update": [[1]], "seconds": 1.0}], "line 2: an update without a step"),
        ([_step(0.0, ["a", 0, 0, 3, 1])], "line 2: KeyError: 'a'"),
        ([_add("x")], "line 2: ValueError"),
        ([_add(0.0, prompt=[1 << 40])], "line 2: OverflowError"),
        ([{"now": 0.0, "step": []}], "line 2: AttributeError"),
        ([{"what": 1}], "line 2: this is no entry of a trace"),
        ([_add(0.0), _step(0.0, ["a", 0, 0, 3, 1]), {"update": [], "seconds": 1.0}], "line 4: ValueError"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, entries: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        read_recording(_file(tmp_path / "trace", entries))
