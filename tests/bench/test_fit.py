"""`octavo trace fit`: from a trace to a cost model, and the simulator beside what was measured."""

import random
from pathlib import Path

import pytest

from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.simulator import Arrival
from server.cli import main
from tests.scheduler.simulated_traces import write_trace

_COST = CostModel(base=0.002, per_token=0.001, knee=8, per_context_token=1e-5)
_CONFIG = SchedulerConfig(num_blocks=60, max_num_seqs=4, max_num_batched_tokens=64)


def _trace(path: Path, monkeypatch: pytest.MonkeyPatch, cost: CostModel = _COST, seed: int = 0) -> Path:
    source = random.Random(seed)
    arrivals = [
        Arrival(time=index / 10, prompt=source.randint(5, 90), output=source.randint(1, 20)) for index in range(60)
    ]
    write_trace(path, _CONFIG, cost, arrivals, monkeypatch)
    return path


def _differences(shown: str) -> list[str]:
    return [line.split()[-1] for line in shown.split("difference\n")[1].splitlines() if line.endswith("%")]


def test_the_fit_of_a_trace_predicts_what_was_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = _trace(tmp_path / "t", monkeypatch)
    assert main(["trace", "fit", str(trace), "--output", str(tmp_path / "cost.json")]) == 0
    shown = capsys.readouterr().out
    fitted = CostModel.from_json((tmp_path / "cost.json").read_text())
    assert fitted.knee == pytest.approx(8, abs=0.01)
    assert fitted.per_token == pytest.approx(0.001, rel=1e-3)
    assert fitted.source in shown
    assert fitted.source.endswith("steps of t")
    assert "half are within 0.0% of the model, 90% within 0.0%; all together the model says" in shown
    differences = _differences(shown)
    assert len(differences) == 14
    assert set(differences) <= {"+0.0%", "-0.0%"}


def test_a_check_shows_that_another_machine_is_slower(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = _trace(tmp_path / "t", monkeypatch)
    slow = CostModel(base=0.004, per_token=0.002, knee=8, per_context_token=2e-5)
    other = _trace(tmp_path / "other", monkeypatch, slow, seed=1)
    assert main(["trace", "fit", str(trace), "--check", str(other)]) == 0
    shown = capsys.readouterr().out
    assert "other, to which nothing was fitted:" in shown
    assert "half are within 50.0% of the model" in shown
    assert "60 requests of other at the moments when they came:" in shown
    times = [float(gap.rstrip("%")) for gap in _differences(shown)[2:]]
    assert len(times) == 12
    assert max(times) < -30, times


def test_a_file_that_is_no_trace_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "t").write_text("{}")
    assert main(["trace", "fit", str(tmp_path / "t")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"octavo: error: {tmp_path}/t: is no scheduler's trace of version 1"
    ]


def test_a_model_that_cannot_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = _trace(tmp_path / "t", monkeypatch)
    assert main(["trace", "fit", str(trace), "--output", str(tmp_path / "no" / "cost.json")]) == 1
    assert "cannot write" in capsys.readouterr().err
