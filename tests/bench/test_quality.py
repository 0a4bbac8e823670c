"""The command from its flags to its report, on a random model of two layers whose tokens are bytes."""

import json
import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import perplexity, quality
from engine.errors import ConfigError
from tests.bench.commands import parse, refuses
from tests.engine.checkpoints import random_model, save

TEXT = "".join(f"Line {number} of a text: {number * 7919 % 1000}, {number * 104729 % 977}.\n" for number in range(40))

FILES = ("text", "prompts", "json", "plot")

Measure = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama", num_hidden_layers=2), tmp_path_factory.mktemp("model"))


@pytest.fixture
def given(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags that every run has."""
    monkeypatch.setenv("OCTAVO_THREADS", "1")
    monkeypatch.setenv("OCTAVO_KV_CACHE_MEMORY", "4MiB")
    (tmp_path / "text.txt").write_text(TEXT)
    size = ["--window", "40", "--segments", "2", "--skip", "10", "--block-size", "4", "--chunk", "16"]
    report = ["--json", str(tmp_path / "report.json")]
    return ["--text", str(tmp_path / "text.txt"), "--model", str(model), "--dtype", "float32", *size, *report]


@pytest.fixture
def measure(given: list[str], tmp_path: Path) -> Iterator[Measure]:
    """Run the command with some more flags; gives its report, which must tell a command that does the same."""

    def run(*more: str, code: int = 0, plot: bool = False) -> Any:
        args = parse(quality, *given, *more, *(["--plot", str(tmp_path / "plot.svg")] if plot else []))
        assert quality.run(args) == code
        report = json.loads((tmp_path / "report.json").read_text())
        again = parse(quality, *shlex.split(report["command"])[3:])
        files = {name: path and Path(path).name for name, path in vars(args).items() if name in FILES}
        assert vars(again) == {**vars(args), **files}
        return report

    return run


def drawn(folder: Path) -> str:
    """The plot; its texts are its comments."""
    return (folder / "plot.svg").read_text()


def test_perplexity_is_that_of_the_scored_tokens_by_policy_and_budget(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = measure("--budgets", "8,40", plot=True)
    full, *others = report["policies"]
    assert [one["label"] for one in report["policies"]] == [
        "full",
        "window window=8",
        "window window=40",
        "streaming sinks=4 window=4",
        "streaming sinks=4 window=36",
    ]
    assert [one["budget"] for one in others] == [8, 40, 8, 40]
    assert full["perplexity"] == pytest.approx(math.sqrt(math.prod(full["by_window"])))
    roomy = [one["perplexity"] for one in others if one["budget"] == 40]
    assert roomy == pytest.approx([full["perplexity"]] * 2, rel=1e-4)
    assert all(abs(one["perplexity"] / full["perplexity"] - 1) > 0.01 for one in others if one["budget"] == 8)
    shown = capsys.readouterr().out
    assert "text.txt: 2 windows of 40 tokens, the last 29 of each scored, 58 in all" in shown
    assert "window window=8                   8" in shown
    assert "streaming:sinks=4,window=*-4" in drawn(tmp_path)


def test_what_is_skipped_is_not_in_the_mean(measure: Measure) -> None:
    scored, everything = (measure("--policy", "full", "--skip", skip)["policies"][0] for skip in ("38", "0"))
    assert scored["perplexity"] != pytest.approx(everything["perplexity"], rel=0.01)


def test_a_format_of_the_cache_costs_more_the_fewer_bits_it_has(
    measure: Measure, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, eight, four = (
        measure("--policy", "full", "--kv-cache-dtype", name)["policies"][0]["by_window"]
        for name in ("auto", "int8", "int4")
    )
    costs = [max(abs(math.log(one / same)) for one, same in zip(found, plain, strict=True)) for found in (eight, four)]
    assert 0 < costs[0] < costs[1] / 2
    assert "float32 with int4 KV" in capsys.readouterr().out


def test_a_selecting_policy_is_measured_by_its_name(measure: Measure) -> None:
    (h2o,) = measure("--policy", "h2o:heavy=*/2,recent=*/2,slack=1,prompt_slack=4", "--budgets", "12")["policies"]
    assert h2o["budget"] == 12
    assert h2o["perplexity"] > 1


def test_a_stream_is_shown_by_position_and_what_keeps_all_stops_early(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = ["--policy", "full", "--policy", "window:window=20"]
    report = measure("--stream", "600", "--bucket", "100", "--full-up-to", "150", *policies, plot=True)
    full, window = report["policies"]
    assert [(part["start"], part["end"]) for part in full["parts"]] == [(0, 100), (100, 150)]
    assert [part["end"] for part in window["parts"]] == [100, 200, 300, 400, 500, 600]
    assert full["parts"][1]["blocks"] == math.ceil(149 / 4)
    assert len({part["blocks"] for part in window["parts"]}) == 1
    block_bytes = 4 * 2 * 2 * 2 * 16 * 4  # tokens, layers, key and value, heads, dimensions, float32
    assert window["kv_bytes"] == window["parts"][0]["blocks"] * block_bytes
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    positions = {row[0]: [cell.strip() for cell in row[1:] if cell] for row in rows}
    assert [name for name in positions if "–" in name] == ["0 – 100", "100 – 200", "200 – 400", "400 – 600"]
    assert positions["100 – 200"][0] == "-"
    late = [part["nll"] for part in window["parts"][2:4]]
    assert float(positions["200 – 400"][1].replace(",", "")) == pytest.approx(math.exp(sum(late) / 2), rel=0.01)
    assert "trained length" in drawn(tmp_path)


def test_greedy_answers_are_compared_with_those_of_the_full_cache(measure: Measure, tmp_path: Path) -> None:
    policies = ["--policy", "window:window=60", "--policy", "window:window=2"]
    roomy, narrow = measure("--generate", "12", *policies, plot=True)["policies"]
    assert roomy["equal_answers"] == roomy["equal_tokens"] == roomy["share_until_first_difference"] == 1
    assert roomy["by_prompt"] == [roomy["until_first_difference"]] * 2
    assert narrow["share_until_first_difference"] < 1
    assert "window:window=60" in drawn(tmp_path)


def test_prompts_may_come_from_a_file_of_their_own(measure: Measure, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": [70, 71]}\n{"prompt": "Say it."}\n{"prompt": "Not this."}\n')
    (one,) = measure("--prompts", str(tmp_path / "prompts.jsonl"), "--generate", "3", "--policy", "full")["policies"]
    assert one["by_prompt"] == [3, 3]


def test_needles_are_counted_by_depth(measure: Measure, tmp_path: Path) -> None:
    (full,) = measure("--needle", "7", "--policy", "full", plot=True)["policies"]
    assert len(full["found"]) == 7
    assert len(full["by_depth"]) == 5
    assert "% of the needles found" in drawn(tmp_path)


def test_an_interruption_leaves_what_was_measured_by_then(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score, calls = perplexity.score, []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args, **options)

    monkeypatch.setattr(perplexity, "score", interrupted)
    report = measure("--budgets", "8", code=130)
    assert report["interrupted"] is True
    assert [one["label"] for one in report["policies"]] == ["full"]
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        (["--window", "1"], "--window"),
        (["--segments", "0"], "--segments"),
        (["--segments", "1000"], "--text"),
        (["--skip", "-1"], "--skip"),
        (["--skip", "39"], "--skip"),
        (["--chunk", "0"], "--chunk"),
        (["--block-size", "0"], "--block-size"),
        (["--prompt-len", "0"], "--prompt-len"),
        (["--stream", "1"], "--stream"),
        (["--stream", "100000"], "--text"),
        (["--bucket", "1"], "--bucket"),
        (["--full-up-to", "1"], "--full-up-to"),
        (["--generate", "0"], "--generate"),
        (["--needle", "4"], "--needle"),
        (["--budgets", "8,x"], "--budgets"),
        (["--policy", "h3o"], "--policy"),
        (["--policy", "streaming:sinks=4,window=253"], "--policy"),
        (["--text", "no/such/file"], "--text"),
        (["--prompts", "x.jsonl"], "--prompts"),
        (["--prompts", "no/such/file.jsonl", "--generate", "4"], "--prompts"),
        (["--dtype", "float8"], "--dtype"),
        (["--plot", "x.nothing"], "--plot"),
    ],
)
def test_settings_that_cannot_work_are_one_line_that_names_the_flag(
    given: list[str], wrong: list[str], flag: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        quality.run(parse(quality, *given, *wrong))
    assert str(caught.value).startswith(flag)
    assert "\n" not in str(caught.value)


def test_a_text_has_to_be_named() -> None:
    assert refuses(quality, ["--text", ""])


def test_only_one_thing_is_measured_at_a_time(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(quality, *given, "--stream", "100", "--needle", "5")
    assert "not allowed with" in capsys.readouterr().err
