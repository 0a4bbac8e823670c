import contextlib
import gc
import json
import random
import shlex
import statistics
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from bench import scheduler as bench
from bench.scheduler import StepTime, Waste, growth, mixed_load, simulate, time_steps
from scheduler.request import Request, StopRule
from tests.bench.commands import parse, refuses


@pytest.mark.parametrize(
    "given",
    [
        ["--running", ""],
        ["--running", "64,0"],
        ["--running", "64,64"],
        ["--context", "0"],
        ["--steps", "0"],
        ["--requests", "0"],
        ["--places", "0"],
        ["--input-len", "0"],
        ["--output-len", "0"],
        ["--sigma", "-1"],
        ["--sigma", "nan"],
        ["--sigma", "5"],
        ["--plot", "curve.xyz"],
    ],
)
def test_a_setting_that_cannot_work_is_one_line_naming_its_flag(given: list[str]) -> None:
    assert refuses(bench, given)


# the time of a step


def test_sequences_decode_in_every_timed_step_and_none_is_preempted() -> None:
    made = bench._decoding(running=5, context=20, steps=40, seed=0)
    for _ in range(40):
        batch = made.schedule(now=0.0)
        assert [len(item.tokens) for item in batch.items] == [1] * 5
        assert all(item.num_samples == 1 for item in batch.items)
        made.update(batch, bench._sampled(batch))
    assert made.num_running == 5
    assert made.counters.preemptions == 0
    made.check()


def test_blocks_are_filled_by_some_sequences_in_a_step_and_not_by_all_at_once() -> None:
    made = bench._decoding(running=32, context=64, steps=20, seed=0)
    filled = []
    for _ in range(16):
        before = made.pool.num_used
        batch = made.schedule(now=0.0)
        made.update(batch, bench._sampled(batch))
        filled.append(made.pool.num_used - before)
    assert sum(filled) == 32, "16 tokens fill a block of each"
    assert max(filled) < 16


def test_every_step_is_timed() -> None:
    seen: list[None] = []
    found = time_steps(running=3, context=16, steps=25, seed=0, on_step=lambda: seen.append(None))
    assert len(seen) == 25
    assert found.running == 3
    assert 0 < found.schedule_p50 < found.p50 <= found.p99 <= found.longest
    assert 0 < found.update_p50 < found.p50


def test_a_step_is_schedule_and_update_together_in_microseconds() -> None:
    took = [(1e-6 * step, 2e-6 * step) for step in range(1, 102)]
    found = bench._step_time(51, took, collecting=101e-6)
    assert found.schedule_p50 == pytest.approx(51)
    assert found.update_p50 == pytest.approx(102)
    assert (found.p50, found.p99, found.longest) == (pytest.approx(153), pytest.approx(300), pytest.approx(303))
    assert found.collecting == pytest.approx(1)
    assert found.ns_per_sequence == pytest.approx(3000)


def test_garbage_collections_are_timed_within_the_block_only() -> None:
    hooks = len(gc.callbacks)
    with bench._collections() as seconds:
        gc.collect()
        gc.collect(0)
    gc.collect()
    assert len(seconds) >= 2
    assert all(0 < second < 10 for second in seconds)
    assert len(gc.callbacks) == hooks


@pytest.mark.parametrize(
    ("setting", "enabled", "frozen"), [("on", True, False), ("frozen", True, True), ("off", False, False)]
)
def test_the_collector_is_as_said_while_steps_are_timed(
    setting: str, enabled: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("engine.launch", "server.app"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    gc.unfreeze()
    with bench._heap_of_a_server(setting):
        assert (gc.isenabled(), gc.get_freeze_count() > 0) == (enabled, frozen)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def step_time(running: int, p50: float) -> StepTime:
    return StepTime(running, p50 / 2, p50 / 2, p50, p50, p50, 0.0)


def test_growth_is_the_exponent_between_the_smallest_and_the_largest() -> None:
    assert growth([step_time(64, 100), step_time(256, 7), step_time(1024, 1600)]) == pytest.approx(1)
    assert growth([step_time(100, 900), step_time(10, 9)]) == pytest.approx(2)
    assert growth([step_time(64, 100)]) is None


# the waste of memory


def request(name: str, prompt: int, answer: int) -> Request:
    first = 1000 * ord(name)  # no two begin alike, so none shares a block
    return Request(name, range(first, first + prompt), StopRule(max_tokens=answer))


def test_waste_is_what_blocks_hold_beyond_their_tokens() -> None:
    finished: list[int] = []
    found = simulate([request("a", 10, 3)], places=1, on_finish=finished.append)
    # After two of three steps one block of 16 holds 10, then 11 computed tokens; after the third, none is held.
    assert found == Waste(steps=3, held_slots=32, filled_slots=21, preemptions=0)
    assert found.share == pytest.approx(11 / 32)
    assert finished == [0, 0, 1]


def test_waste_is_summed_over_sequences_and_steps() -> None:
    found = simulate([request("a", 16, 2), request("b", 20, 3)], places=2, on_finish=lambda _: None)
    # a: 16 of 16, then it ends. b: 20 of 32, 21 of 32, then it ends.
    assert found == Waste(steps=3, held_slots=16 + 32 + 32, filled_slots=16 + 20 + 21, preemptions=0)


def test_so_many_requests_run_at_a_time() -> None:
    alone = simulate([request(str(n), 4, 10) for n in range(4)], places=1, on_finish=lambda _: None)
    together = simulate([request(str(n), 4, 10) for n in range(4)], places=4, on_finish=lambda _: None)
    assert (alone.steps, together.steps) == (40, 10)


def test_the_mixed_load_has_the_means_that_were_asked_for() -> None:
    load = list(
        mixed_load(parse(bench, "--requests", "4000", "--input-len", "40", "--output-len", "60", "--sigma", "0.8"))
    )
    assert statistics.fmean(r.num_prompt_tokens for r in load) == pytest.approx(40, rel=0.05)
    assert statistics.fmean(r.stop.max_tokens for r in load) == pytest.approx(60, rel=0.05)
    assert min(r.num_prompt_tokens for r in load) >= 1
    assert len({tuple(r.sequences[0].tokens[:8]) for r in load[:100]}) == 100


def test_without_spread_all_lengths_are_equal() -> None:
    source = random.Random(0)
    assert {bench._draw_length(40, 0.0, source) for _ in range(9)} == {40}


# all of it


def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *given: str) -> Any:
    monkeypatch.setattr(bench, "_heap_of_a_server", lambda _: contextlib.nullcontext())
    report = tmp_path / "report.json"
    small = ["--context", "16", "--steps", "10", "--requests", "6", "--places", "3"]
    assert bench.run(parse(bench, *small, "--json", str(report), *given)) == 0
    return json.loads(report.read_text())


def test_times_and_waste_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = execute(tmp_path, monkeypatch, "--running", "8,2,4", "--plot", str(tmp_path / "p.png"))
    assert [step["running"] for step in report["steps"]] == [8, 2, 4]
    assert all(step["ns_per_sequence"] == step["p50"] * 1e3 / step["running"] for step in report["steps"])
    assert report["waste"]["share"] == 1 - report["waste"]["filled_slots"] / report["waste"]["held_slots"]
    assert report["growth_exponent"] is not None
    assert parse(bench, *shlex.split(report["command"])[3:]).running == "8,2,4"
    shown = capsys.readouterr().out
    assert "A step's time grows as the number of sequences to the power" in shown
    assert f"{report['waste']['share']:.2%} of the slots in allocated blocks of 16 held no token" in shown
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_one_size_has_no_growth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = execute(tmp_path, monkeypatch, "--running", "2", "--plot", str(tmp_path / "p.svg"))
    assert report["growth_exponent"] is None
    assert "to the power" not in capsys.readouterr().out
