"""The benches against Octavo's own server, engine and scheduler, around a model that only says "A"."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import batching, chat, local_server
from bench.batching import refilled_steps, static_steps
from server.command_table import CommandModule
from tests.bench.commands import parse, settings
from tests.server.scripted import staged

SETTINGS = ("batching", "batch_size", "batch_delay", "max_num_seqs", "prefix_caching")
"""Those that the benches set, and that matter without a model."""


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`octavo serve FLAGS` is such a server with these flags. It knows 258 tokens only, so prompts have no others."""

    @contextmanager
    def server(serve_flags: Sequence[str], port: int = 0) -> Iterator[str]:
        config = settings(serve_flags)
        with staged(**{name: getattr(config, name) for name in SETTINGS}) as stage:
            stage.model.pace = 0.003
            yield stage.live.url

    monkeypatch.setattr(local_server, "local_server", server)
    monkeypatch.setattr(batching, "FIRST_RANDOM_ID", 1)
    monkeypatch.setattr(batching, "DEFAULT_VOCAB_SIZE", 250)


def execute(bench: CommandModule, path: Path, *given: str) -> Any:
    assert bench.run(parse(bench, *given, "--json", str(path))) == 0
    return json.loads(path.read_text())


@pytest.mark.usefixtures("scripted")
def test_batches_take_the_steps_that_are_predicted(tmp_path: Path) -> None:
    # No more in flight than a batch takes: so it is always the next four, however the network orders them.
    flags = ["--batch-size", "4", "--num-requests", "12", "--concurrency", "4", "--output-len", "6", "--seed", "3"]
    report = execute(batching, tmp_path / "report.json", *flags, "--input-len", "9", "--modes", "static,continuous")
    (lengths,) = batching.make_plan(parse(batching, *flags, "--input-len", "9")).answers()
    static, continuous = report["modes"]
    assert static["steps"] == static_steps(lengths, 4)
    # Not exactly the fewest steps: a place waits for its next request until the client has read the last answer.
    assert refilled_steps(lengths, 4) <= continuous["steps"] < static["steps"]
    assert report["fewest_steps"] == refilled_steps(lengths, 4)
    assert all(mode["tokens_per_step"] == sum(lengths) / mode["steps"] for mode in report["modes"])


@pytest.mark.usefixtures("scripted")
def test_a_turn_computes_the_turns_before_again_only_without_the_cache(tmp_path: Path) -> None:
    sizes = ["--system-len", "5", "--question-len", "3", "--answer-len", "20", "--conversations", "2", "--turns", "2"]
    report = execute(chat, tmp_path / "report.json", *sizes)
    cached, uncached = (server["turns"] for server in report["servers"])
    assert [turn["most_repeated"] for turn in cached] == [0, pytest.approx(8, abs=8)]  # of a block of 16
    assert [turn["cached_tokens"] for turn in uncached] == [0, 0]
    assert uncached[1]["most_repeated"] >= uncached[0]["prompt_tokens"] + 19
    assert [turn["prompt_tokens"] for turn in cached] == [turn["prompt_tokens"] for turn in uncached]
    (first, second), *_ = report["servers"][0]["conversations"]
    assert second["cached_tokens"] > first["prompt_tokens"] - 16
