import random
import statistics
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench import batching, batching_run
from bench.arrivals import ClosedLoop, OpenLoop
from bench.batching import Measured, conclusions, draw_length, refilled_steps, static_steps
from bench.batching_run import Work, work_done
from bench.client import Server
from bench.measure import RequestRecord, Run, summarize
from bench.prompts import Prompt
from engine.errors import OctavoError
from tests.bench.commands import Bench, parse, refuses, settings
from tests.bench.fake_openai import FakeServer, serving


def plan(*given: str) -> batching.Plan:
    return batching.make_plan(parse(batching, *given))


# the load


def test_the_defaults_make_a_plan() -> None:
    made = plan()
    assert made.modes == ("none", "static", "dynamic", "continuous")
    assert made.level == ClosedLoop(16)
    assert (made.batch_size, made.places, made.num_requests, made.repeats) == (8, 8, 96, 1)


def test_somebody_always_waits_however_many_run() -> None:
    assert plan("--max-num-seqs", "32").level == ClosedLoop(64)
    assert plan("--batch-size", "4").level == ClosedLoop(8)
    assert plan("--concurrency", "8").level == ClosedLoop(8)
    assert plan("--rate", "2.5").level == OpenLoop(2.5)


@pytest.mark.parametrize(
    "given",
    [
        ["--batch-size", "0"],
        ["--num-requests", "12"],
        ["--num-requests", "0"],
        ["--num-requests", "-8"],
        ["--max-num-seqs", "7"],
        ["--concurrency", "7"],
        ["--concurrency", "0"],
        ["--rate", "1,2"],
        ["--rate", "0"],
        ["--modes", ""],
        ["--modes", "static,static"],
        ["--modes", "static,lazy"],
        ["--batch-delay", "-1"],
        ["--input-len", "0"],
        ["--output-len", "0"],
        ["--repeats", "0"],
        ["--timeout", "0"],
        ["--serve-args", "'"],
    ],
)
def test_a_setting_that_cannot_work_is_one_line_naming_its_flag(given: list[str]) -> None:
    assert refuses(batching, given)


def test_every_mode_gets_the_same_requests_and_every_repeat_others() -> None:
    made = plan("--repeats", "2", "--num-requests", "8", "--input-len", "20")
    assert made.prompts(0) == plan("--modes", "none", "--num-requests", "8", "--input-len", "20").prompts(0)
    drawn = [*made.prompts(0), *made.prompts(1), *made.warmup()]
    assert len({tuple(prompt.content) for prompt in drawn}) == 24
    assert {prompt.length for prompt in drawn} == {20}
    assert made.answers() == [[p.output_len for p in made.prompts(repeat)] for repeat in (0, 1)]
    assert plan("--seed", "1", "--num-requests", "8", "--input-len", "20").prompts(0) != made.prompts(0)


def test_modes_alternate_so_that_drift_falls_on_all() -> None:
    servers = plan("--repeats", "2", "--modes", "static,continuous").servers()
    assert [mode for mode, _ in servers] == ["static", "continuous", "static", "continuous"]


@pytest.mark.parametrize("mode", batching.MODES)
def test_the_server_understands_the_flags_of_every_mode(mode: str) -> None:
    made = plan("--batch-size", "4", "--max-num-seqs", "16", "--batch-delay", "0.25")
    config = settings(["embedded", *made.serve_flags(mode)])
    assert (config.batching, config.prefix_caching) == (mode, False)
    assert config.max_num_seqs == (16 if mode == "continuous" else 4)
    if mode in ("static", "dynamic"):
        assert config.batch_size == 4
    if mode == "dynamic":
        assert config.batch_delay == 0.25


def test_exponential_lengths_have_the_mean_the_spread_and_the_bounds() -> None:
    source = random.Random(1)
    drawn = [draw_length("exponential", 64, source) for _ in range(20_000)]
    assert statistics.fmean(drawn) == pytest.approx(64, rel=0.03)
    assert statistics.stdev(drawn) == pytest.approx(64, rel=0.05)
    assert (min(drawn), max(drawn)) == (1, 512)


def test_uniform_lengths_lie_between_one_and_twice_the_mean() -> None:
    source = random.Random(1)
    drawn = [draw_length("uniform", 8, source) for _ in range(2000)]
    assert statistics.fmean(drawn) == pytest.approx(8, rel=0.05)
    assert (min(drawn), max(drawn)) == (1, 15)
    assert draw_length("uniform", 1, source) == 1


def test_the_title_tells_the_lengths_that_were_drawn() -> None:
    made = plan("--num-requests", "8", "--lengths", "uniform", "--output-len", "1")
    assert made.title == (
        "8 requests of 128 tokens, 16 in flight; answers of 1 to 1 tokens, 1 on average; batches of 8"
    )
    assert "requests of 128 tokens, 2/s; answers" in plan("--rate", "2").title


# what refilling can save


def test_a_static_batch_takes_as_many_steps_as_its_longest_answer() -> None:
    assert static_steps([5, 1, 1, 1, 2, 9], 2) == 5 + 1 + 9
    assert static_steps([5, 1, 1, 1, 2, 9], 6) == 9
    assert static_steps([3, 4], 1) == 7


def test_refilled_places_go_to_the_next_answer_as_soon_as_one_ends() -> None:
    # Two places: 5 | 1 1 1 2, then 9 follows whichever ends first, both at step 5.
    assert refilled_steps([5, 1, 1, 1, 2, 9], 2) == 14
    assert refilled_steps([3, 4], 1) == 7
    assert refilled_steps([3, 4], 9) == 4
    assert refilled_steps([2, 2, 2, 2], 2) == 4
    assert refilled_steps([8, 1, 8, 1, 8, 1], 3) == 10


def test_refilling_never_takes_more_steps_than_static_batches() -> None:
    source = random.Random(7)
    for _ in range(200):
        lengths = [source.randint(1, 50) for _ in range(24)]
        assert max(sum(lengths) / 4, max(lengths)) <= refilled_steps(lengths, 4) <= static_steps(lengths, 4)


# what is reported


def measured(rate: float, steps: int) -> Measured:
    """A mode that gave 100 tokens at this rate."""
    record = RequestRecord(0, start=0.0, chunk_times=array("d", [1.0, 2.0]), last=2.0, output_tokens=100)
    run = Run("x", 0, [record], duration=100 / rate)
    return Measured([run], summarize([run]), steps, 100 / steps)


COULD = (
    "Refilling the places of static batches could lower the steps for these answers from 215 to 98, or 2.19 times "
    "fewer."
)


def test_the_gain_is_told_beside_the_steps_that_were_and_could_be_saved() -> None:
    assert conclusions(plan(), {"static": measured(40, 210), "continuous": measured(70, 100)}, 215, 98) == [
        COULD,
        "Continuous batching lowered them from 210 to 100, or 2.10 times fewer, and gave 1.75 times the output tok/s.",
    ]


def test_a_gain_that_fewer_steps_do_not_explain_is_called_in_question() -> None:
    lines = conclusions(plan(), {"static": measured(40, 210), "continuous": measured(90, 100)}, 215, 98)
    assert "2.25 times the output tok/s" in lines[1]
    assert lines[2].startswith("That is more than fewer steps explain")


def test_without_both_modes_only_what_could_be_saved_is_told() -> None:
    one = measured(70, 100)
    assert conclusions(plan(), {"continuous": one}, 215, 98) == [COULD]
    more = replace(one, runs=[*one.runs, *one.runs])  # Ctrl-C came before the second repeat of the other
    assert conclusions(plan(), {"static": more, "continuous": one}, 215, 98) == [COULD]


def test_in_an_open_loop_throughput_is_no_conclusion() -> None:
    (line,) = conclusions(plan("--rate", "2"), {"static": measured(1, 1), "continuous": measured(1, 1)}, 9, 3)
    assert "compare TTFT and latency" in line


def test_repeats_are_pooled_and_modes_keep_their_order() -> None:
    def run(tokens: int) -> Run:
        record = RequestRecord(0, start=0.0, chunk_times=array("d", [1.0]), last=1.0, output_tokens=tokens)
        return Run("x", 0, [record], duration=1.0)

    pooled = batching.pool(
        [("static", (run(10), Work(4, 10))), ("continuous", (run(1), Work(0, 0))), ("static", (run(20), Work(6, 20)))]
    )
    assert list(pooled) == ["static", "continuous"]
    assert (pooled["static"].steps, pooled["static"].tokens_per_step) == (10, 3.0)
    assert (pooled["static"].summary.runs, pooled["static"].summary.output_tokens_per_s) == (2, 15.0)
    assert pooled["continuous"].tokens_per_step == 0


def test_the_work_of_a_server_is_read_off_its_metrics() -> None:
    page = (
        "# TYPE octavo:iteration_tokens_total histogram\n"
        'octavo:iteration_tokens_total_bucket{le="1.0"} 5.0\n'
        "octavo:iteration_tokens_total_count 41.0\n"
        "octavo:iteration_tokens_total_sum 1234.0\n"
        "octavo:prompt_tokens_total 7.0\n"
        'octavo:generation_tokens_total{model_name="a b"} 1.5e+02\n'
    )
    assert work_done(page) == Work(41, 150)
    with pytest.raises(OctavoError, match="no octavo:generation_tokens_total"):
        work_done(page.rpartition("octavo:generation")[0])


# all of it, against a server that answers at once


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving(FakeServer(sequences_per_step=2)) as server:
        yield server


SMALL = ["--batch-size", "2", "--num-requests", "4", "--input-len", "5", "--output-len", "3"]


@pytest.fixture
def bench(fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(batching, SMALL, fake, tmp_path, monkeypatch)


def test_each_mode_is_measured_on_a_server_of_its_own(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = bench.run(plot=True)
    assert outcome.code == 0
    assert [flags[flags.index("--batching") + 1] for flags in outcome.started] == [*batching.MODES]
    made = plan(*SMALL)
    tokens = sum(map(sum, made.answers()))
    assert [mode["mode"] for mode in outcome.report["modes"]] == [*batching.MODES]
    for mode in outcome.report["modes"]:
        assert (mode["requests"], mode["failed"], mode["output_tokens"]) == (4, 0, tokens)
        assert mode["steps"] == pytest.approx(tokens / 2, abs=1)  # the metrics are cut to whole steps
        assert mode["tokens_per_step"] == pytest.approx(2, rel=0.2)
    (lengths,) = made.answers()
    assert outcome.report["static_steps"] == static_steps(lengths, 2)
    assert outcome.report["fewest_steps"] == refilled_steps(lengths, 2)
    assert not outcome.report["interrupted"]
    shown = capsys.readouterr().out
    assert shown.startswith(made.title)
    rows = {line.split()[0]: line.split() for line in shown.split("\n") if line.startswith(batching.MODES)}
    assert list(rows) == [*batching.MODES]
    assert all(len(row) == 10 for row in rows.values())
    assert rows["none"][3] == "1.00"
    assert "Refilling the places of static batches could lower" in shown
    assert all(f"<!-- {text} -->" in bench.drawn for text in (made.title, "Throughput", *batching.MODES))


def test_what_is_sent_is_the_load_after_one_whole_batch_to_warm_up(bench: Bench) -> None:
    bench.run("--modes", "static")
    made = plan(*SMALL)
    sent = [Prompt(body["prompt"], body["max_tokens"]) for body in bench.fake.bodies]
    assert sorted(sent[:2], key=str) == sorted(made.warmup(), key=str)
    assert sorted(sent[2:], key=str) == sorted(made.prompts(0), key=str)
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in bench.fake.bodies)


def test_every_repeat_has_its_own_requests(bench: Bench) -> None:
    bench.run("--modes", "static", "--repeats", "2")
    made = plan(*SMALL, "--repeats", "2")
    sent = [Prompt(body["prompt"], body["max_tokens"]) for body in bench.fake.bodies]
    assert sorted(sent[2:6] + sent[8:], key=str) == sorted(made.prompts(0) + made.prompts(1), key=str)


def test_failed_requests_are_told_and_make_the_exit_code_1(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.fake.broken = frozenset({3})
    outcome = bench.run("--modes", "continuous")
    assert (outcome.code, outcome.report["modes"][0]["failed"]) == (1, 1)
    assert "continuous: 1 of 4 requests failed:" in capsys.readouterr().err


def test_a_warm_up_that_fails_ends_it(bench: Bench) -> None:
    bench.fake.broken = frozenset({0})
    with pytest.raises(OctavoError, match="a warm-up request failed: HTTP 500: it broke"):
        bench.run()


def test_ctrl_c_reports_the_modes_before(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = batching_run.measure

    async def measure(made: batching.Plan, mode: str, repeat: int, server: Server) -> tuple[Run, Work]:
        if mode == "dynamic":
            raise KeyboardInterrupt
        return await real(made, mode, repeat, server)

    monkeypatch.setattr(batching_run, "measure", measure)
    outcome = bench.run()
    assert (outcome.code, len(outcome.started)) == (130, 3)
    assert outcome.report["interrupted"]
    assert [mode["mode"] for mode in outcome.report["modes"]] == ["none", "static"]
    assert "interrupted; the figures are of the servers" in capsys.readouterr().err
