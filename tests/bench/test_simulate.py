"""`octavo simulate` from its flags to its answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.simulator import Arrival
from server.cli import main
from tests.scheduler.simulated_traces import write_trace

_H100 = ["--device", "h100", "--model", "llama-3.1-8b"]
_SHORT = ["--input-len", "20", "--output-len", "3"]


@pytest.fixture
def cost(tmp_path: Path) -> str:
    """A replica whose steps take 0.1 s; it serves one request at a time."""
    (tmp_path / "cost.json").write_text(CostModel(base=0.1).to_json())
    return str(tmp_path / "cost.json")


def _one_at_a_time(cost: str) -> list[str]:
    return ["--cost", cost, "--num-blocks", "100", "--max-num-seqs", "1", "--input-len", "20", "--output-len", "1"]


def _simulate(*flags: str) -> int:
    return main(["simulate", *flags])


def _figures(text: str) -> dict[str, list[str]]:
    return {line[:20].strip(): line[20:].split() for line in text.splitlines() if line[:20].strip()}


def test_a_table_shows_what_each_number_of_replicas_does(
    capsys: pytest.CaptureFixture[str], cost: str, tmp_path: Path
) -> None:
    """Even arrivals of 20/s; a replica serves 10/s."""
    file = str(tmp_path / "out.json")
    flags = ["--rate", "20", "--duration", "5", "--burstiness", "1e6", "--slo", "ttft=150", "--json", file]
    assert _simulate(*flags, *_one_at_a_time(cost), "--replicas", "1,2,4") == 0
    shown = capsys.readouterr().out
    assert "20 requests/s for 5 s, arrivals of burstiness 1e+06; prompts of 20 tokens, answers of 1" in shown
    assert "objective: ttft ≤ 150 ms, for 99% of the requests" in shown
    figures = _figures(shown)
    assert figures["replicas"] == ["1", "2", "4"]
    assert float(figures["requests/s"][0]) == pytest.approx(10, abs=0.5)
    assert float(figures["requests/s"][1]) == pytest.approx(20, abs=0.5)
    assert figures["TTFT p50, ms"][2] == "100.0"
    assert "note, 1 replica: it does not keep up" in shown
    assert "note, 4 replicas: every replica was simulated" in shown
    document = json.loads(Path(file).read_text())
    assert [one["replicas"] for one in document["tries"]] == [1, 2, 4]
    assert document["tries"][2]["speed"]["attained"] == 1.0
    assert document["cost"]["base"] == 0.1
    assert document["answer"] is None
    assert document["command"].startswith("octavo simulate --rate 20 --burstiness 1000000.0 --duration 5.0")
    assert str(tmp_path) not in document["command"]


def test_the_least_number_of_replicas_is_found(capsys: pytest.CaptureFixture[str], cost: str) -> None:
    """By hand: even arrivals of 75/s, 10/s a replica, so 7 fall behind and 8 make nobody wait."""
    flags = ["--rate", "75", "--duration", "10", "--burstiness", "1e9", "--slo", "ttft=101"]
    assert _simulate(*flags, *_one_at_a_time(cost)) == 0
    shown = capsys.readouterr().out
    assert "8 replicas are enough, if more are never worse." in shown
    tries = {row.split()[0]: row.split()[1] for row in shown.split("simulated\n")[1].split("\n\n")[0].splitlines()}
    assert (tries["7"], tries["8"]) == ("no", "yes")
    assert next(iter(tries)) == "8", "the first guess is what one replica can do"


def test_of_an_overloaded_replica_only_the_first_requests_are_looked_at(
    capsys: pytest.CaptureFixture[str], cost: str
) -> None:
    flags = ["--rate", "1000", "--duration", "5", "--sample", "30", "--replicas", "1"]
    assert _simulate(*flags, *_one_at_a_time(cost)) == 0
    shown = capsys.readouterr().out
    assert _figures(shown)["requests simulated"] == ["60"]
    assert "only the first 60 requests were looked at; --sample sets how many" in shown


def test_an_objective_beyond_reach_is_said_to_be_so(capsys: pytest.CaptureFixture[str], cost: str) -> None:
    flags = ["--rate", "2", "--duration", "5", "--slo", "ttft=99"]
    assert _simulate(*flags, *_one_at_a_time(cost)) == 1
    assert "No number of replicas is enough, not even 10." in capsys.readouterr().out


def test_a_cluster_of_ten_thousand_is_simulated_by_a_sample(capsys: pytest.CaptureFixture[str], cost: str) -> None:
    flags = ["--rate", "4/replica", "--duration", "2", "--routing", "random", "--sample", "100"]
    assert _simulate(*flags, *_one_at_a_time(cost), "--replicas", "1,10000") == 0
    shown = capsys.readouterr().out
    figures = _figures(shown)
    assert "4 requests/s for each replica for 2 s" in shown
    assert float(figures["requests/s"][1].replace(",", "")) == pytest.approx(40_000, rel=0.35)
    assert int(figures["requests simulated"][1]) == pytest.approx(100, abs=40)
    assert "a sample: 13 of 10,000 replicas were simulated" in shown


def test_the_same_seed_gives_the_same_figures_and_another_gives_others(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for seed in ("1", "1", "2"):
        assert _simulate("--rate", "8", "--duration", "4", *_H100, *_SHORT, "--replicas", "2", "--seed", seed) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]
    assert "an estimate for llama-3.1-8b on h100 at 50% of its data sheet's FLOP/s" in shown[0]


def test_a_trace_is_played_again_on_the_scheduler_it_was_recorded_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals = [Arrival(time=float(index), prompt=5, output=4) for index in range(50)]
    model = CostModel(base=0.125)
    write_trace(tmp_path / "t", SchedulerConfig(num_blocks=40, max_num_seqs=7), model, arrivals, monkeypatch)
    (tmp_path / "cost.json").write_text(model.to_json())
    flags = ["--load", str(tmp_path / "t"), "--cost", str(tmp_path / "cost.json"), "--replicas", "1"]
    assert _simulate(*flags) == 0
    shown = capsys.readouterr().out
    assert "50 requests of t over 49 s" in shown
    assert "40 KV blocks of 16 tokens, 7 sequences" in shown
    assert _figures(shown)["latency p50, ms"] == ["500.0"]
    assert _simulate(*flags, "--speed", "10", "--max-num-seqs", "1") == 0
    shown = capsys.readouterr().out
    assert "50 requests of t over 4.9 s, 10 times as fast as recorded" in shown
    assert "7 sequences" not in shown
    assert "it does not keep up" in shown


def test_lines_of_json_are_a_load(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = [{"time": index / 4, "prompt_tokens": 40, "output_tokens": 2, "prefix": index % 3} for index in range(40)]
    for line in lines:
        line["prefix_tokens"] = 32
    (tmp_path / "load.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _simulate("--load", str(tmp_path / "load.jsonl"), *_H100, "--replicas", "3", "--routing", "prefix") == 0
    assert _figures(capsys.readouterr().out)["prefix hits"] == [f"{37 * 32 / 40 / 40:.1%}"]


def test_every_setting_of_the_scheduler_reaches_it(tmp_path: Path) -> None:
    flags = {
        "num_blocks": 9,
        "num_host_blocks": 8,
        "block_size": 32,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 99,
        "preemption": "swap",
        "queue_timeout": 5.0,
    }
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--no-prefix-caching", "--batching", "dynamic", "--batch-size", "3", "--batch-delay", "0.5"]
    words += ["--scheduling", "fair", "--ageing", "2", "--json", str(tmp_path / "out.json")]
    assert _simulate("--rate", "8", "--duration", "1", *_H100, *_SHORT, "--replicas", "2", *words) == 0
    replica: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())["replica"]
    assert replica == {
        **flags,
        "prefix_caching": False,
        "batching": {"mode": "dynamic", "size": 3, "delay": 0.5},
        "order": {"policy": "fair", "ageing": 2.0},
    }


def test_a_static_batch_that_never_fills_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--rate", "9", "--duration", "1", *_H100, *_SHORT, "--batching", "static", "--batch-size", "4"]
    assert _simulate(*flags, "--replicas", "1") == 0
    shown = capsys.readouterr().out
    assert _figures(shown)["left waiting"] == ["1"]
    assert "1 requests wait for others to fill their static batch; they count nowhere" in shown


def test_a_model_may_be_described_by_its_config_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    for model in (tmp_path, tmp_path / "config.json"):
        flags = ["--rate", "8", "--duration", "1", "--device", "l4", "--model", str(model), *_SHORT]
        assert _simulate(*flags, "--replicas", "1") == 0
    assert "on l4 at 50%" in capsys.readouterr().out


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    flags = ["--rate", "8", "--duration", "2", *_H100, *_SHORT, "--replicas", "1,30", "--slo", "ttft=9"]
    assert _simulate(*flags, "--plot", str(tmp_path / "p.svg")) == 0
    drawn = (tmp_path / "p.svg").read_text()
    assert drawn.startswith("<?xml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --replicas, to see what so many do, or --slo, to find how many are enough"),
        (["--slo", "ttft"], "--slo takes ttft, tpot, latency with milliseconds"),
        (["--replicas", "0"], "--replicas takes positive whole numbers, not '0'"),
        (["--replicas", "2000000"], "--replicas takes numbers up to 1,000,000"),
        (["--replicas", "1"], "say what comes: --rate R requests/s, or --load FILE"),
        (["--replicas", "1", "--rate", "0"], "--rate takes positive numbers of requests per second, not '0'"),
        (["--replicas", "1", "--rate", "1,2"], "--rate takes one rate here, not '1,2'"),
        (["--replicas", "1", "--rate", "1e9"], "make 60,000,000,000 requests, more than 50,000,000"),
        (
            ["--slo", "ttft=9", "--rate", "3/replica"],
            "--rate 3/replica grows with the replicas, so it needs --replicas",
        ),
        (["--replicas", "1", "--rate", "1", "--burstiness", "0"], "--burstiness must be a positive number"),
        (["--replicas", "1", "--rate", "1", "--duration", "0"], "--duration must be at least 0.001"),
        (["--replicas", "1", "--rate", "1", "--attainment", "99"], "--attainment is a share, above 0 and up to 1"),
        (["--replicas", "1", "--rate", "1", "--input-len", "x"], "--input-len takes a number of tokens, uniform"),
        (["--replicas", "1", "--load", "no/file"], "no/file: cannot be read: No such file"),
        (["--replicas", "1", "--load", "no/file", "--speed", "0"], "--speed must be a positive number"),
        (["--replicas", "1", "--rate", "1"], "say what a step costs: --device and --model"),
        (["--replicas", "1", "--rate", "1", "--device", "h100"], "say what a step costs: --device and --model"),
        (["--replicas", "1", "--rate", "1", "--device", "x", "--model", "y"], "--device takes a100, h100, h200, l4"),
        (["--replicas", "1", "--rate", "1", "--device", "l4", "--model", "y"], "--model takes llama-3.1-8b, llama"),
        (
            ["--replicas", "1", "--rate", "1", *_H100, "--cost", "x"],
            "--cost says what a step costs, and so do --device",
        ),
        (["--replicas", "1", "--rate", "1", "--cost", "x"], "give --num-blocks"),
        (["--replicas", "1", "--rate", "1", "--cost", "x", "--num-blocks", "1"], "x: No such file"),
        (["--replicas", "1", "--rate", "1", *_H100, "--num-blocks", "0"], "--num-blocks must be at least 1, not 0"),
        (["--replicas", "1", "--rate", "1", *_H100, "--max-num-seqs", "0"], "--max-num-seqs must be at least 1"),
        (["--replicas", "1", "--rate", "1", *_H100, "--flops-share", "0"], "--flops-share is a share"),
        (
            ["--replicas", "1", "--rate", "1", *_H100, "--preemption", "swap"],
            "preemption by swapping needs host blocks",
        ),
        (
            ["--replicas", "1", "--rate", "1", "--device", "h100", "--model", "llama-3.1-70b"],
            "llama-3.1-70b has 141.1 GB of weights, which leave no room for a KV cache in the 80 GB of the h100",
        ),
        (
            ["--replicas", "1", "--rate", "1", *_H100, "--num-blocks", "5"],
            "request 0 can never run: the request may need 384 tokens of KV cache, but the cache holds 80 in all",
        ),
        (
            ["--slo", "ttft=9", "--rate", "1", *_H100, "--num-blocks", "5"],
            "request 0 can never run: the request may need 384 tokens of KV cache, but the cache holds 80 in all",
        ),
        (["--replicas", "1", "--rate", "1", "--routing", "prefix"], "--routing prefix needs a load with prefixes"),
        (
            ["--replicas", "9", "--rate", "1", "--routing", "prefix", "--prefixes", "3"],
            "--routing prefix keeps no more replicas busy than there are prefixes, 3",
        ),
    ],
)
def test_what_cannot_be_simulated_is_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert _simulate(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("octavo: error: ")
    assert message in line
