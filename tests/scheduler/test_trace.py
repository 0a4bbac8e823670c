"""A trace replays to the same decisions, and shows where they differ."""

import json
import stat
from pathlib import Path
from random import Random
from typing import Any

import pytest

from scheduler.batching import Batching
from scheduler.config import SchedulerConfig
from scheduler.kv_memory import KVMemory
from scheduler.request import Request, Sequence, StopRule
from scheduler.trace import Replay, TracedScheduler, TraceError
from scheduler.waiting_queue import Order
from server.cli import main
from tests.scheduler.memory import step_tokens


def _record(path: Path, **limits: Any) -> TracedScheduler:
    """A minute in the life of a scheduler under pressure: forks, beams, aborts, deadlines, preemptions."""
    config = {
        "num_blocks": 12,
        "num_host_blocks": 6,
        "block_size": 2,
        "max_num_batched_tokens": 9,
        "queue_timeout": 50.0,
    }
    scheduler, random = TracedScheduler(SchedulerConfig(**{**config, **limits}), path), Random(3)
    requests = []
    for now in range(200):
        if now < 60:
            prompt = [1, 2, 3, 4, now % 3] * random.randint(1, 2)
            beams = 2 if now % 7 == 0 else None
            rule = StopRule(
                max_tokens=random.randint(1, 7), stop_token_ids=frozenset({7}) - frozenset({7} if beams else ())
            )
            places = 1 if beams else random.randint(1, 2)
            salt = random.choice([None, "x"])
            request = Request(f"r{now}", prompt, rule, n=places, beam_width=beams, cache_salt=salt, deadline=now + 40.0)
            scheduler.add(request, float(now))
            requests.append(request)
            if now % 11 == 10:
                scheduler.abort(random.choice(requests))
        scheduler.expire(float(now))
        batch = scheduler.schedule(float(now))
        scheduler.update(batch, step_tokens(batch))
        for beams_request in {item.sequence.request for item in batch.items if item.sequence.request.beam_width}:
            live = beams_request.sequences
            if all(beam.parked for beam in live):
                if live[0].num_output_tokens >= 3:
                    for beam in tuple(live):
                        scheduler.finish(beam, "stop")
                else:
                    scheduler.advance(beams_request, [(live[0], 5), (live[0], 6)])
    scheduler.close()
    return scheduler


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"preemption": "recompute", "order": Order(policy="fair")},
        {"batching": Batching(mode="dynamic", size=3, delay=2.0)},
        {"prefix_caching": False, "num_host_blocks": 0},
    ],
    ids=str,
)
def test_a_trace_replays_to_the_same_decisions(tmp_path: Path, limits: dict[str, Any]) -> None:
    scheduler = _record(tmp_path / "trace", **limits)
    replay = Replay(tmp_path / "trace")
    replay.run()
    assert (replay.requests, replay.preemptions) == (60, scheduler.counters.preemptions)
    assert replay.steps == 200
    assert replay.preemptions > 0 or "batching" in limits


def test_the_command_says_how_much_was_replayed_or_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path / "trace")
    assert main(["trace", "replay", str(tmp_path / "trace")]) == 0
    assert "of 60 requests" in capsys.readouterr().out
    assert main(["trace", "replay", str(tmp_path / "nothing")]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_a_trace_is_its_owners_only_and_names_no_salt(tmp_path: Path) -> None:
    _record(tmp_path / "trace")
    assert stat.S_IMODE((tmp_path / "trace").stat().st_mode) == 0o600
    assert '"x"' not in (tmp_path / "trace").read_text()


def _edited(path: Path, number: int, change: dict[str, Any]) -> Path:
    lines = path.read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **change})
    path.write_text("\n".join(lines))
    return path


def test_a_decision_that_differs_is_named_with_its_line(tmp_path: Path) -> None:
    _record(tmp_path / "trace")
    lines = (tmp_path / "trace").read_text().splitlines()
    number = next(index for index, line in enumerate(lines) if '"step"' in line)
    step = json.loads(lines[number])["step"]
    _edited(tmp_path / "trace", number, {"step": {**step, "free": 99}})
    with pytest.raises(TraceError, match=rf"line {number + 1}: free was 99, and is {step['free']} now"):
        Replay(tmp_path / "trace").run()


def test_a_scheduler_that_fails_leaves_a_trace_that_replays_to_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(memory: KVMemory, sequence: Sequence, num_tokens: int) -> None:
        if sequence.num_computed_tokens:
            raise RuntimeError("a bug")
        grow(memory, sequence, num_tokens)

    grow = KVMemory.grow
    scheduler = TracedScheduler(SchedulerConfig(num_blocks=4), tmp_path / "trace")
    scheduler.add(Request("a", [1], StopRule(max_tokens=2)))
    scheduler.update(batch := scheduler.schedule(), step_tokens(batch))
    with monkeypatch.context() as bug:
        bug.setattr(KVMemory, "grow", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            scheduler.schedule(1.0)
        with pytest.raises(TraceError, match="line 5: RuntimeError: a bug"):
            Replay(tmp_path / "trace").run()
    Replay(tmp_path / "trace").run()
    scheduler.close()


def test_what_was_decided_is_in_the_file_while_the_step_is_computed(tmp_path: Path) -> None:
    scheduler = TracedScheduler(SchedulerConfig(num_blocks=4), tmp_path / "trace")
    scheduler.add(Request("a", [1], StopRule(max_tokens=2)))
    scheduler.schedule()
    replay = Replay(tmp_path / "trace")
    replay.run()
    assert (replay.requests, replay.steps) == (1, 1)
    scheduler.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no scheduler's trace of version 1"),
        ('{"version":2}', "is no scheduler's trace of version 1"),
        ("[]", "line 1: this is no entry"),
        ("{", "line 1: is not valid JSON"),
        ('{"version":1,"config":{"num_blocks":0}}', "line 1: KeyError: 'batching'"),
        ('{"version":1,"config":{"num_blocks":0,"batching":{},"order":{}}}', "line 1: ValueError: a block pool needs"),
        ('{"version":1,"config":{"num_blocks":"many","batching":{},"order":{}}}', "line 1: TypeError"),
        ('{"version":1,"config":{"num_blocks":1,"batching":{},"order":{}}}\n{"abort":"x"}', "line 2: KeyError: 'x'"),
        (
            '{"version":1,"config":{"num_blocks":1,"batching":{},"order":{}}}\n'
            '{"now":0,"add":{"id":"x","prompt":[99999999999],"root":"","stop":{"max_tokens":1,"min_tokens":0,'
            '"stop_token_ids":[]},"n":1,"beam_width":null,"priority":0,"tenant":"","deadline":null}}',
            "line 2: OverflowError",
        ),
        ('{"version":1,"config":{"num_blocks":1,"batching":{},"order":{}}}\n{"what":1}', "line 2: this is no entry"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "trace").write_text(content)
    with pytest.raises(TraceError, match=message):
        Replay(tmp_path / "trace").run()
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        Replay(tmp_path / "nothing").run()
