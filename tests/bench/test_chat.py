import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import chat
from bench.chat import TurnSummary, equal_answers, scripts, summarize_turns
from bench.client import Server
from bench.conversation import Script, Turn, hold_all
from engine.errors import OctavoError
from tests.bench.commands import Bench, parse, refuses, settings
from tests.bench.fake_openai import FakeServer, serving


def said(*given: str) -> list[Script]:
    return scripts(parse(chat, *given))


# what is said


def test_conversations_differ_and_are_the_same_for_the_same_seed() -> None:
    sizes = ["--conversations", "3", "--turns", "2", "--system-len", "40", "--question-len", "9"]
    made = said(*sizes)
    assert made == said(*sizes)
    assert made != said(*sizes, "--seed", "1")
    texts = [text for script in made for text in (script.system, *script.questions)]
    assert len(set(texts)) == len(texts) == 9
    assert {len(script.system.split()) for script in made} == {40}
    assert {len(question.split()) for script in made for question in script.questions} == {9}


def test_a_system_prompt_can_be_shared() -> None:
    made = said("--shared-system-prompt")
    assert len({script.system for script in made}) == 1
    assert len({tuple(script.questions) for script in made}) == len(made)


@pytest.mark.parametrize(
    "given",
    [
        ["--conversations", "0"],
        ["--turns", "0"],
        ["--concurrency", "0"],
        ["--system-len", "0"],
        ["--question-len", "-1"],
        ["--answer-len", "0"],
        ["--timeout", "-1"],
        ["--base-url", "there:8000"],
    ],
)
def test_a_setting_that_cannot_work_is_one_line_naming_its_flag(given: list[str]) -> None:
    assert refuses(chat, given)


def test_the_server_understands_what_sets_the_two_apart() -> None:
    assert [settings(flags).prefix_caching for flags in chat.SERVERS.values()] == [True, False]


# what follows from it


def turn(ttft: float, prompt: int, cached: int, output: int = 10, answer: str = "a") -> Turn:
    return Turn(ttft, prompt, cached, output, answer)


def test_turns_are_summarized_over_the_conversations() -> None:
    first, second = summarize_turns(
        [
            [turn(0.1, 100, 0), turn(0.02, 130, 96)],
            [turn(0.3, 104, 0, output=20), turn(0.04, 144, 112)],
            [turn(0.2, 102, 0), turn(0.09, 134, 104)],
        ]
    )
    assert first == TurnSummary(1, 102, 0, 0, pytest.approx(200), pytest.approx(300))
    # Of the past 110, 124 and 112 tokens, 14, 12 and 8 were not in the cache.
    assert second == TurnSummary(2, 136, 104, 14, pytest.approx(40), pytest.approx(90))
    assert second.computed_tokens == 32


def test_a_cache_that_holds_more_than_the_past_repeats_nothing() -> None:
    _, second = summarize_turns([[turn(1, 100, 0), turn(1, 130, 128)]])
    assert second.most_repeated == 0


def test_answers_are_compared_turn_by_turn() -> None:
    mine = [[turn(1, 1, 0, answer="a"), turn(1, 1, 0, answer="b")], [turn(1, 1, 0, answer="c")]]
    other = [[turn(1, 1, 0, answer="a"), turn(1, 1, 0, answer="x")], [turn(1, 1, 0, answer="c")]]
    assert equal_answers({"one": mine, "two": other}) == (2, 3)
    assert equal_answers({"one": mine, "two": mine}) == (3, 3)


def test_the_ratio_is_how_many_times_longer_one_waits_without_the_cache() -> None:
    cached, uncached = TurnSummary(1, 100, 64, 0, 20.0, 30.0), TurnSummary(1, 100, 0, 64, 50.0, 60.0)
    assert chat._table({"a": [cached], "b": [uncached]}).split("\n")[-1].split() == [
        *("1", "100"),
        *("36", "20.00", "30.00"),
        *("100", "50.00", "60.00"),
        "2.5",
    ]


# conversations held


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving(FakeServer(remembers=True)) as server:
        yield server


async def test_every_turn_sends_the_whole_past_with_the_servers_own_answers(fake: FakeServer) -> None:
    script = Script("be brief now", ["first one", "and a second"])
    (turns,) = await hold_all(Server(fake.url, "chat"), [script], answer_len=3, concurrency=1, label="x")
    warmup, first, second = (body["messages"] for body in fake.bodies)
    assert [message["role"] for message in warmup] == ["system", "user"]
    assert first == [{"role": "system", "content": "be brief now"}, {"role": "user", "content": "first one"}]
    answer = {"role": "assistant", "content": "nénéné"}
    assert second == [*first, answer, {"role": "user", "content": "and a second"}]
    assert [(t.prompt_tokens, t.cached_tokens, t.output_tokens, t.answer) for t in turns] == [
        (5, 0, 3, "nénéné"),
        (11, 8, 3, "nénéné"),
    ]
    assert all(body["max_tokens"] == body["min_tokens"] == 3 for body in fake.bodies[1:])
    assert not any(body["ignore_eos"] for body in fake.bodies), "a token without text would be lost to the next turn"


async def test_ttft_ends_with_the_first_token_and_not_with_the_role(fake: FakeServer) -> None:
    fake.first_delay, fake.gap = 0.05, 0.03
    ((turn,),) = await hold_all(Server(fake.url, "chat"), [Script("s", ["q"])], answer_len=3, concurrency=1, label="x")
    told = fake.writes[1][0] - fake.arrivals[1]
    assert 0.05 <= told < turn.ttft < told + 0.2


async def test_so_many_conversations_are_held_at_a_time(fake: FakeServer) -> None:
    fake.first_delay = 0.01
    made = said("--conversations", "4", "--turns", "2", "--system-len", "2", "--question-len", "1")
    held = await hold_all(Server(fake.url, "chat"), made, answer_len=1, concurrency=3, label="x")
    assert [len(turns) for turns in held] == [2, 2, 2, 2]
    assert fake.most_in_flight == 3


async def test_a_turn_that_fails_ends_the_measurement_with_its_error(fake: FakeServer) -> None:
    fake.broken = frozenset({2})
    with pytest.raises(OctavoError, match="/v1/chat/completions: HTTP 500: it broke"):
        await hold_all(Server(fake.url, "chat"), [Script("s", ["a", "b"])], answer_len=1, concurrency=1, label="x")


async def test_a_server_that_gives_no_usage_cannot_be_measured(fake: FakeServer) -> None:
    fake.usage = False
    with pytest.raises(OctavoError, match="gives no usage"):
        await hold_all(Server(fake.url, "chat"), [Script("s", ["a"])], answer_len=1, concurrency=1, label="x")


# all of it


SMALL = ["--conversations", "2", "--turns", "3", "--system-len", "50", "--question-len", "4", "--answer-len", "2"]


@pytest.fixture
def bench(fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(chat, SMALL, fake, tmp_path, monkeypatch)


def test_the_two_servers_are_compared_turn_by_turn(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.fake.per_token = 0.002
    outcome = bench.run("--serve-args", "--threads 1", plot=True)
    assert outcome.code == 0
    own = ("--prefix-caching", "--no-prefix-caching")
    assert outcome.started == [["embedded", "--threads", "1", flag] for flag in own]
    assert [server["label"] for server in outcome.report["servers"]] == ["prefix caching", "no prefix caching"]
    cached = outcome.report["servers"][0]
    assert [(t["prompt_tokens"], t["cached_tokens"], t["most_repeated"]) for t in cached["turns"]] == [
        (54, 0, 0),
        (60, 56, 0),
        (66, 62, 0),
    ]
    assert cached["turns"][0]["ttft_p50"] >= 108 > cached["turns"][1]["ttft_p50"] >= 8
    assert [len(turns) for turns in cached["conversations"]] == [3, 3]
    shown = capsys.readouterr().out
    assert re.search(r"\n1 +54 +54 .*\n2 +60 +4 .*\n3 +66 +4 ", shown)
    assert "\nprefix caching: up to 0 tokens of the turns before were computed again.\n" in shown
    assert "6 of 6 answers are the same with both servers." in shown
    assert all(f"<!-- {label} -->" in bench.drawn for label in chat.SERVERS)


def test_one_running_server_is_measured_as_it_is(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.fake.remembers = False
    outcome = bench.run("--base-url", bench.fake.url, plot=True)
    assert (outcome.code, outcome.started) == (0, [])
    (server,) = outcome.report["servers"]
    assert server["label"] == bench.fake.url
    assert [turn["most_repeated"] for turn in server["turns"]] == [0, 56, 62]
    shown = capsys.readouterr().out
    assert f"{bench.fake.url}: up to 62 tokens of the turns before were computed again." in shown
    assert "with both servers" not in shown
    assert f"<!-- {bench.fake.url} -->" in bench.drawn
