import asyncio
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import stall
from bench.client import Server
from bench.intrusion import Gap, Intrusion, intrude_all
from bench.prompts import Prompt
from bench.stall import Stall, summarize_stall
from engine.errors import OctavoError
from tests.bench.commands import Bench, refuses, settings
from tests.bench.fake_openai import FakeServer, serving

# what follows from the moments at which tokens came

STEADY = [8.0, 8.9, 9.0, 9.5, 10.0]
"""Before the prompt, which is sent at 10: steady for the last second only."""


def test_a_gap_belongs_to_the_time_in_which_its_middle_lies() -> None:
    one = Intrusion([[1.0, 2.0, 4.0], [1.5, 2.5]], sent=0.0, answered=9.0)
    assert list(one.gaps(1.5, 2.0)) == [Gap(2.0, 1.0)]
    assert list(one.gaps(2.0, 3.0)) == [Gap(2.5, 1.0)]
    assert list(one.gaps(1.5, 3.1)) == [Gap(2.0, 1.0), Gap(4.0, 2.0), Gap(2.5, 1.0)]
    assert one.ttft == 9.0


def test_a_stall_ends_with_the_prompt_s_first_token_though_the_streams_get_theirs_just_after() -> None:
    one = Intrusion([[*STEADY, 14.01, 14.5]], sent=10.0, answered=14.0)
    found = summarize_stall([one], quiet=1.0)
    assert (found.steady_p50, found.steady_p99) == (500, 500)
    assert found.itl_max == found.itl_p99 == pytest.approx(4010)
    assert (found.tokens, found.ttft) == (1, 4000)


def test_repeats_and_streams_are_pooled() -> None:
    chunked = Intrusion([[*STEADY, 11.0, 12.0, 14.0], [*STEADY, 11.0, 12.0, 14.0]], sent=10.0, answered=14.0)
    faster = Intrusion([[*STEADY, 12.0], [*STEADY, 12.0]], sent=10.0, answered=12.0)
    found = summarize_stall([chunked, faster], quiet=1.0)
    # Eight gaps, 1 1 2 s in each of two streams and 2 s in each of two: the largest of eight is at 100%.
    assert found == Stall(500, 500, 2000, 2000, tokens=2, ttft=3000)


def test_the_99th_percentile_is_not_the_longest_gap() -> None:
    many = [10.0 + 0.1 * number for number in range(1, 200)]
    one = Intrusion([[*STEADY, *many, 31.0]], sent=10.0, answered=31.0)
    found = summarize_stall([one], quiet=1.0)
    assert found.itl_max == pytest.approx(1100)
    assert found.itl_p99 == pytest.approx(100, rel=0.1)


def test_streams_that_got_nothing_are_an_error_and_not_a_figure() -> None:
    with pytest.raises(OctavoError, match="no stream got a token meanwhile"):
        summarize_stall([Intrusion([STEADY], sent=10.0, answered=10.1)], quiet=1.0)


@pytest.mark.parametrize(
    "given",
    [
        ["--budgets", ""],
        ["--budgets", "256,256"],
        ["--budgets", "0"],
        ["--prompt-len", "0"],
        ["--streams", "0"],
        ["--context", "0"],
        ["--stream-len", "0"],
        ["--quiet", "0"],
        ["--repeats", "0"],
        ["--timeout", "0"],
    ],
)
def test_a_setting_that_cannot_work_is_one_line_naming_its_flag(given: list[str]) -> None:
    assert refuses(stall, given)


# prompts that arrive


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving(FakeServer(gap=0.002, stall=0.1)) as server:
        yield server


LONG = [Prompt([7] * 101, 1), Prompt([8] * 101, 1)]


async def test_running_streams_wait_for_the_prompt(fake: FakeServer) -> None:
    running = [Prompt([1], 5000), Prompt([2], 5000)]
    (one,) = await intrude_all(Server(fake.url), running, LONG, quiet=0.1, label="x")
    assert len(one.streams) == 2
    before = [gap.length for gap in one.gaps(one.sent - 0.1, one.sent)]
    assert len(before) > 3
    during = [gap.length for gap in one.gaps(one.sent, one.answered)]
    assert one.ttft >= 0.1
    assert statistics.median(before) < 0.05
    assert 0.09 < max(during) < 0.3
    assert all(times[-1] > one.answered for times in one.streams), "they go on for a while"
    warmup, *streams, intruder = fake.bodies
    assert (len(warmup["prompt"]), len(intruder["prompt"])) == (101, 101)
    assert warmup["prompt"] != intruder["prompt"]
    assert sorted(body["prompt"] for body in streams) == [[1], [2]]


async def test_the_streams_are_hung_up_on_at_the_end(fake: FakeServer) -> None:
    await intrude_all(Server(fake.url), [Prompt([1], 5000)], [*LONG, LONG[0]], quiet=0.1, label="x")
    for _ in range(500):
        if fake.in_flight == 0:
            break
        await asyncio.sleep(0.01)
    assert (fake.in_flight, fake.hung_up) == (0, 2)


@pytest.mark.parametrize(
    ("behaviour", "stream_len", "told"),
    [
        ({}, 8, "raise --stream-len"),
        ({}, 3, "raise --stream-len"),
        ({"broken": frozenset({1})}, 5000, "HTTP 500: it broke"),
        ({"broken": frozenset({2})}, 5000, "HTTP 500: it broke"),
        ({"broken": frozenset({0})}, 5000, "a warm-up request failed: HTTP 500"),
    ],
)
async def test_what_goes_wrong_is_told_in_one_line(
    fake: FakeServer, behaviour: dict[str, object], stream_len: int, told: str
) -> None:
    for name, value in behaviour.items():
        setattr(fake, name, value)
    with pytest.raises(OctavoError, match=told) as caught:
        await intrude_all(Server(fake.url), [Prompt([1], stream_len)], LONG, quiet=0.1, label="x")
    assert "\n" not in str(caught.value)


# all of it

SMALL = ["--prompt-len", "101", "--streams", "2", "--context", "3", "--stream-len", "5000", "--quiet", "0.1"]


@pytest.fixture
def bench(fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(stall, SMALL, fake, tmp_path, monkeypatch)


def test_budgets_are_compared_on_servers_that_understand_their_flags(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = bench.run("--budgets", "256,2048", "--repeats", "1", plot=True)
    assert outcome.code == 0
    configs = [settings(flags) for flags in outcome.started]
    assert [(config.max_num_batched_tokens, config.prefix_caching) for config in configs] == [
        (256, False),
        (2048, False),
    ]
    assert [budget["label"] for budget in outcome.report["budgets"]] == ["256", "2048"]
    for budget in outcome.report["budgets"]:
        assert 1 < budget["steady_p50"] < 90 < budget["itl_max"]
        (alone,) = budget.pop("repeats")
        assert budget == {"label": budget["label"], **alone}
    shown = capsys.readouterr().out
    assert "A prompt of 101 tokens arrives at 2 running streams; 1 times" in shown
    assert [line.split()[0] for line in shown.split("\n")[4:6]] == ["256", "2048"]
    assert all(f"<!-- {budget} tokens per step -->" in bench.drawn for budget in ("256", "2,048"))


def test_a_prompt_that_stalls_nobody_ends_it_at_the_first_server(bench: Bench) -> None:
    bench.fake.stall, bench.fake.gap = 0.0, 0.08
    with pytest.raises(OctavoError, match="too short to stall any"):
        bench.run("--budgets", "256,2048", "--repeats", "1", "--quiet", "0.3")
    assert sum(len(body["prompt"]) == 101 for body in bench.fake.bodies) == 2, "a warm-up and one more"


def test_one_running_server_is_measured_as_it_is(bench: Bench) -> None:
    outcome = bench.run("--base-url", bench.fake.url, "--repeats", "2", plot=True)
    assert (outcome.code, outcome.started) == (0, [])
    (only,) = outcome.report["budgets"]
    assert (only["label"], len(only["repeats"])) == (bench.fake.url, 2)
    assert f"<!-- {bench.fake.url} -->" in bench.drawn, "the panel is called by the address"
    assert "tokens per step" not in bench.drawn
