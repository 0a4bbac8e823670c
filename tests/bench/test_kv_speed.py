"""The command from its flags to its report, on a random model of two layers. What is timed is checked, not times."""

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import kv_speed, steady
from bench.kv_held import Holding, Service
from bench.kv_mixed import Times, _times
from bench.kv_recompute import Recompute
from bench.steady import Decoding, Group, Step, Subject, whole_cycles
from bench.teacher_forcing import load
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv_policies.full import Full
from engine.kv_policies.h2o import H2O
from engine.kv_policies.policy import KVPolicy
from engine.kv_policies.streaming import Streaming
from engine.kv_policies.window import SlidingWindow
from engine.model_runner import ModelRunner
from scheduler.batch import ScheduledBatch
from tests.bench.commands import parse
from tests.engine.checkpoints import random_model, save

TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
"""One token's KV: two layers, keys and values, two heads of 16 dimensions, float32."""
MIB = 2**20
BANDWIDTH = 1e9
POLICIES = ("full", "streaming:sinks=2,window=14", "h2o:heavy=8,recent=8,slack=4,prompt_slack=8")
H2O_SMALL = H2O(heavy=8, recent=8, slack=4, prompt_slack=8)

Measure = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama", num_hidden_layers=2), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def subject(model: Path) -> Subject:
    config = EngineConfig(model=str(model), dtype="float32", threads=1, block_size=4, kv_cache_memory=4 * MIB)
    return Subject(*load(config), BANDWIDTH)


@pytest.fixture
def given(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags that every run has."""
    monkeypatch.setenv("OCTAVO_THREADS", "1")
    monkeypatch.setenv("OCTAVO_KV_CACHE_MEMORY", "4MiB")
    monkeypatch.setattr("bench.step.read_bandwidth", lambda: BANDWIDTH)
    sizes = {
        "steps": 8,
        "contexts": "64,300",
        "batch": "1,2",
        "windows": "16,300",
        "repeats": 2,
        "kv-cache-memory": f"{40 * 4 * TOKEN_BYTES}",
        "requests": 8,
        "input-len": 60,
        "output-len": 20,
        "plain": 2,
        "mixed-context": 64,
        "chunk": 64,
        "block-size": 4,
        "dtype": "float32",
    }
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    policies = [word for policy in POLICIES for word in ("--policy", policy)]
    return ["--model", str(model), *flags, *policies, "--json", str(tmp_path / "report.json")]


@pytest.fixture
def measure(given: list[str], tmp_path: Path) -> Iterator[Measure]:
    """Run the command with some more flags; gives its report, which must tell a command that does the same."""

    def run(*more: str, code: int = 0, plot: bool = False) -> Any:
        args = parse(kv_speed, *given, *more, *(["--plot", str(tmp_path / "plot.svg")] if plot else []))
        assert kv_speed.run(args) == code
        report = json.loads((tmp_path / "report.json").read_text())
        again = parse(kv_speed, *shlex.split(report["command"])[3:])
        files = {name: value and Path(value).name for name, value in vars(args).items() if name in ("json", "plot")}
        assert vars(again) == {**vars(args), **files}
        return report

    return run


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[ScheduledBatch]:
    """Every step that a model computes."""
    seen: list[ScheduledBatch] = []

    class Recording(ModelRunner):
        def execute(self, batch: ScheduledBatch, *others: Any) -> Any:
            seen.append(batch)
            return super().execute(batch, *others)

    for module in ("steady", "kv_recompute"):
        monkeypatch.setattr(f"bench.{module}.ModelRunner", Recording)
    return seen


# sequences that decode with a context that nobody computed


@pytest.mark.parametrize("policy", [Full(), Streaming(sinks=2, window=14), H2O_SMALL])
def test_no_prompt_is_computed_and_every_step_decodes(
    subject: Subject, executed: list[ScheduledBatch], policy: KVPolicy
) -> None:
    group = Group((policy,) * 3, context=200, steps=8)
    decoding = Decoding(subject, subject.cache(group.num_blocks(subject)), group)
    for _ in range(8):
        decoding.step()
    assert len(executed) == steady.WARM_STEPS + 8
    assert all([len(item.tokens) for item in batch.items] == [1, 1, 1] for batch in executed)
    assert all(item.num_samples == 1 for batch in executed for item in batch.items)


def test_plain_sequences_end_at_the_context(subject: Subject, executed: list[ScheduledBatch]) -> None:
    group = Group((Full(), H2O_SMALL, Full()), context=100, steps=5)
    decoding = Decoding(subject, subject.cache(group.num_blocks(subject)), group)
    for _ in range(5):
        decoding.step()
    plain = [item.start + 1 for item in executed[-1].items if item.kv_budget is None]
    assert plain == [100, 100]


def test_a_sequence_alone_fits_into_the_blocks_that_it_is_said_to_take(subject: Subject) -> None:
    for policy in (Full(), Streaming(sinks=2, window=14), H2O_SMALL):
        group = Group((policy,), context=64, steps=2)
        decoding = Decoding(subject, subject.cache(group.num_blocks(subject)), group)
        for _ in range(2):
            decoding.step()


def test_a_policy_selects_in_the_timed_steps_as_often_as_its_slack_says(
    subject: Subject, executed: list[ScheduledBatch]
) -> None:
    group = Group((H2O_SMALL,) * 2, context=120, steps=8)
    decoding = Decoding(subject, subject.cache(group.num_blocks(subject)), group)
    for _ in range(8):
        decoding.step()
    assert [len(batch.compactions) for batch in executed[-8:]].count(2) == 2
    assert sum(len(batch.compactions) for batch in executed[-8:]) == 4


def test_a_window_holds_what_its_budget_says_however_long_the_context(
    subject: Subject, executed: list[ScheduledBatch]
) -> None:
    group = Group((Streaming(sinks=2, window=14),), context=1000, steps=2)
    Decoding(subject, subject.cache(group.num_blocks(subject)), group)
    (item,) = executed[-1].items
    assert item.start > 900
    assert len(item.block_table) <= 6


def test_a_model_with_windows_reads_no_more_than_they_are(tmp_path: Path, executed: list[ScheduledBatch]) -> None:
    folder = save(random_model("mistral", num_hidden_layers=2, sliding_window=8), tmp_path)
    config = EngineConfig(model=str(folder), dtype="float32", threads=1, block_size=4, kv_cache_memory=MIB)
    subject = Subject(*load(config), BANDWIDTH)
    group = Group((Full(), SlidingWindow(window=5)), context=200, steps=2)
    (refused,) = Recompute(subject, [16], repeats=1, steps=1, chunk=64).each()
    assert refused.times is None
    assert "layers that see 8 tokens" in str(refused.not_possible)
    step = Decoding(subject, subject.cache(group.num_blocks(subject)), group).step()
    assert step.kv_bytes == (8 + 5) * TOKEN_BYTES
    assert max(len(item.block_table) for item in executed[-1].items) <= 3


def test_a_group_that_an_engine_has_no_room_for_is_refused_in_words(subject: Subject) -> None:
    assert Group((Full(),) * 8, 256, 4).refusal(subject) is None
    assert "there is room for 2,048" in str(Group((Full(),) * 33, 256, 4).refusal(subject))
    assert Group((Full(),), 257, 4).refusal(subject) == "the model's context length is 256 tokens"
    assert Group((Streaming(sinks=2, window=14),), 257, 4).refusal(subject) is None
    assert Group((H2O_SMALL,), 257, 4).refusal(subject) == "the model's context length is 256 tokens"


def test_steps_are_whole_cycles_of_selections() -> None:
    assert whole_cycles(8, [Full()]) == 8
    assert whole_cycles(1, [Full(), H2O_SMALL]) == 8
    assert whole_cycles(9, [H2O_SMALL]) == 12


# the four parts


def test_a_decode_step_reads_what_its_policy_keeps(
    measure: Measure, subject: Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measure("--part", "decode")["decode"]
    by_case = {(one["label"].split()[0], one["context"], one["batch"]): one for one in found}
    assert len(by_case) == len(found) == 3 * 2 * 2
    kept = {"full": sum(range(57, 65)) / 8, "streaming": 16, "h2o": (17 + 18 + 19 + 20) / 4}
    for name, tokens in kept.items():
        for batch in (1, 2):
            timing = by_case[name, 64, batch]["timing"]
            assert timing["steps"] == 8
            assert timing["p50_ms"] > 0
            assert timing["kv_mib"] == pytest.approx(batch * tokens * TOKEN_BYTES / MIB)
            read = subject.weight_bytes + batch * tokens * TOKEN_BYTES
            assert timing["floor_ms"] == pytest.approx(read / BANDWIDTH * 1e3)
    assert by_case["streaming", 300, 2]["timing"]["kv_mib"] == pytest.approx(2 * 16 * TOKEN_BYTES / MIB)
    for name in ("full", "h2o"):
        assert by_case[name, 300, 1]["timing"] is None
        assert by_case[name, 300, 1]["not_possible"] == "the model's context length is 256 tokens"
    assert "full, 2 × 300: not possible, the model's context length is 256 tokens" in capsys.readouterr().out


def test_recomputation_computes_the_whole_window_for_each_token(
    measure: Measure, executed: list[ScheduledBatch]
) -> None:
    possible, not_possible = measure("--part", "recompute", "--chunk", "10")["recompute"]
    times = possible["times"]
    assert possible["window"] == 16
    assert times["ratio"] == pytest.approx(times["recompute_ms"] / times["streaming_ms"])
    recomputed = [batch.num_tokens for batch in executed if batch.num_tokens > 1]
    assert recomputed == [10, 6] * 2
    assert len(executed) == 4 + steady.WARM_STEPS + 8
    assert not_possible["times"] is None
    assert "context length" in not_possible["not_possible"]


def holding(subject: Subject, policy: KVPolicy, blocks: int, requests: int, length: tuple[int, int]) -> Service | str:
    """How a policy serves requests of (prompt, answer) tokens in so many blocks of 4, or why it cannot."""
    from bench.policy_list import Candidate

    candidate = Candidate(policy, policy.name, None)
    (held,) = Holding(subject, [candidate], blocks, requests, *length, chunk=1000).each()
    assert (held.service is None) == (held.not_possible is not None)
    return held.service or held.not_possible or ""


def test_as_many_requests_run_as_find_blocks(subject: Subject) -> None:
    # A prompt of 8 tokens takes two blocks, its first token comes with it, and it has ended.
    assert holding(subject, Full(), 6, 7, (8, 1)) == Service(peak=3, mean=7 / 3, steps=3, preemptions=0)
    # Two more tokens take a third block each, which two of three get from the one that was last: 3, 2, 2, 1 and 1 run.
    assert holding(subject, Full(), 6, 3, (8, 3)) == Service(peak=3, mean=9 / 5, steps=5, preemptions=1)


def test_a_window_holds_more_of_them(subject: Subject) -> None:
    plain, windowed = (holding(subject, policy, 60, 12, (40, 40)) for policy in (Full(), SlidingWindow(window=4)))
    assert isinstance(plain, Service)
    assert isinstance(windowed, Service)
    assert windowed.peak > plain.peak
    assert windowed.steps < plain.steps


def test_requests_that_can_never_run_are_said_to(subject: Subject) -> None:
    assert "context length" in str(holding(subject, Full(), 1000, 1, (200, 57)))
    assert isinstance(holding(subject, SlidingWindow(window=4), 1000, 1, (200, 57)), Service)
    assert "may need 80 tokens of KV cache" in str(holding(subject, Full(), 10, 1, (60, 20)))


def test_batches_are_timed_in_turns_beside_the_one_with_a_further_plain_request(
    measure: Measure, executed: list[ScheduledBatch]
) -> None:
    alone, plain, *others = measure("--part", "mixed")["mixed"]
    assert [one["label"].split(" sinks")[0].split(" heavy")[0] for one in (alone, plain, *others)] == [
        "2 plain",
        "+ 1 plain",
        "+ 1 streaming",
        "+ 1 h2o",
    ]
    assert alone["times"]["over_plain_ms"] is None
    assert plain["times"]["over_plain_ms"] == 0
    assert all(one["times"]["over_plain_ms"] != 0 for one in others)
    assert [len(batch.items) for batch in executed[-8:]] == [2, 3, 3, 3] * 2
    read = [one["times"]["kv_mib"] * MIB / TOKEN_BYTES for one in (alone, plain, *others)]
    tokens = sum(range(57, 65)) / 8
    assert read == pytest.approx([2 * tokens, 3 * tokens, 2 * tokens + 16, 2 * tokens + 18.5])


def test_differences_are_taken_turn_by_turn() -> None:
    """The machine is slower in every second turn; what a batch takes more than the one beside it is the same in all."""
    turns = [[Step(slow + more, 2**20) for more in (0.0, 0.001, 0.003)] for slow in (0.010, 0.050, 0.010)]
    assert _times(turns, 0) == Times(pytest.approx(10), pytest.approx(70 / 3), None, None, 1.0)
    assert _times(turns, 2) == Times(
        pytest.approx(13), pytest.approx(70 / 3 + 3), pytest.approx(2), pytest.approx(2), 1.0
    )


def test_a_mixed_batch_that_is_too_long_is_said_to_be(measure: Measure, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure("--part", "mixed", "--mixed-context", "300")["mixed"]
    assert all(one["times"] is None and "context length" in one["not_possible"] for one in found)
    assert "not possible: the model's context length is 256 tokens" in capsys.readouterr().out


# all of it


def test_all_parts_are_measured_and_drawn(measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = measure(plot=True)
    assert all(report[name] for name in kv_speed.PARTS)
    assert report["interrupted"] is False
    shown, drawn = capsys.readouterr().out, (tmp_path / "plot.svg").read_text()
    assert "8 requests of 60 + 20 tokens" in shown
    assert "in 0 MiB: 40 blocks of 4" in shown
    for words in ("batch of 2", "A token of a stream", "Requests held at equal memory", "2 plain requests and another"):
        assert words in drawn


def test_an_interruption_leaves_what_was_measured_by_then(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = Decoding.step, []

    def interrupted(self: Decoding) -> Step:
        calls.append(self)
        if len(calls) == 2 * (steady.WARM_STEPS + 8):
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Decoding, "step", interrupted)
    report = measure("--part", "decode,held", code=130)
    assert report["interrupted"] is True
    assert [one["label"] for one in report["decode"]] == ["full"]
    assert "held" not in report
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        (["--part", "decode,speed"], "--part"),
        (["--part", ""], "--part"),
        (["--policy", "h3o"], "--policy"),
        (["--policy", "streaming:sinks=4,window=253"], "--policy"),
        (["--budgets", "x"], "--budgets"),
        (["--steps", "0"], "--steps"),
        (["--contexts", "64,x"], "--contexts"),
        (["--contexts", "11"], "--contexts"),
        (["--batch", "0"], "--batch"),
        (["--windows", "4"], "--windows"),
        (["--repeats", "0"], "--repeats"),
        (["--kv-cache-memory", "much"], "--kv-cache-memory"),
        (["--kv-cache-memory", "100"], "--kv-cache-memory"),
        (["--requests", "0"], "--requests"),
        (["--input-len", "0"], "--input-len"),
        (["--output-len", "0"], "--output-len"),
        (["--plain", "0"], "--plain"),
        (["--mixed-context", "11"], "--mixed-context"),
        (["--chunk", "0"], "--chunk"),
        (["--block-size", "0"], "--block-size"),
        (["--plot", "x.nothing"], "--plot"),
    ],
)
def test_settings_that_cannot_work_are_one_line_that_names_the_flag(
    given: list[str], wrong: list[str], flag: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        kv_speed.run(parse(kv_speed, *given, *wrong))
    assert str(caught.value).startswith(flag)
    assert "\n" not in str(caught.value)
