"""Faults: the scheduler's are a failure of the engine, told to every client; others end the requests concerned."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.errors import EngineDeadError, NumericalError, OutOfMemoryError, RequestTimeoutError
from engine.forward_batch import ForwardBatch
from engine.kv_cache import KVCache
from engine.launch import LoadedModel, assemble
from engine.model_runner import ModelRunner
from engine.models.decoder import Decoder
from engine.sampler import Sample, SampleRow, sample
from engine.sampling_params import SamplingParams
from scheduler.kv_memory import KVMemory
from scheduler.scheduler import Scheduler
from tests.engine.driving import GREEDY, Answer, ask, until


@asynccontextmanager
async def _running(loaded: LoadedModel, **limits: Any) -> AsyncIterator[AsyncEngine]:
    engine = assemble(EngineConfig(kv_cache_memory=1 << 20, **limits), loaded)
    await engine.start()
    yield engine
    await engine.stop()


async def _served(engine: AsyncEngine) -> None:
    await ask(engine, [1, 2], GREEDY)


async def _aborted_in_a_batch_that_waits_to_fill(engine: AsyncEngine) -> None:
    stream = engine.submit([1, 2], GREEDY, request_id="a")
    await asyncio.sleep(0)
    stream.abort()


async def _late(engine: AsyncEngine) -> None:
    with pytest.raises(RequestTimeoutError):
        await anext(engine.submit([1, 2], GREEDY, request_id="a", timeout=0.0))


@pytest.mark.parametrize(
    ("ended", "limits"),
    [(_served, {}), (_aborted_in_a_batch_that_waits_to_fill, {"batching": "static"}), (_late, {})],
)
async def test_the_memory_is_checked_whenever_the_engine_becomes_idle_and_not_in_between(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, ended: Any, limits: dict[str, Any]
) -> None:
    checks: list[bool] = []
    monkeypatch.setattr(Scheduler, "check", lambda scheduler: checks.append(scheduler.has_work))
    async with _running(tiny, **limits) as engine:
        for number in range(1, 4):
            await until(lambda number=number: len(checks) == number)  # type: ignore[misc]
            await ended(engine)
        await until(lambda: len(checks) == 4)
    assert checks == [False] * 4


async def test_a_block_that_is_left_behind_is_a_failure_of_the_engine(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(KVMemory, "free", lambda *_: None)
    async with _running(tiny) as engine:
        assert len((await ask(engine, [1, 2], GREEDY)).tokens[0]) == 16
        await until(lambda: not engine.is_healthy())
        assert "a block's references differ from the tables that hold it" in caplog.text
        with pytest.raises(EngineDeadError, match="the engine has failed"):
            engine.submit([1, 2], GREEDY, request_id="b")


async def test_clients_are_told_of_a_failure_though_nothing_can_be_freed_any_more(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(Scheduler, "schedule", fail)
    monkeypatch.setattr(Scheduler, "abort", fail)
    async with _running(tiny) as engine, asyncio.timeout(5):
        for answer in await asyncio.gather(*(ask(engine, [1], GREEDY, name) for name in "ab"), return_exceptions=True):
            assert isinstance(answer, EngineDeadError)
    assert [record.message for record in caplog.records] == [
        "the engine's loop failed",
        "what the failed requests held cannot be freed",
    ]


POISON = 7


def _poisoned(logits: Tensor, rows: list[SampleRow], *rest: Any) -> list[Sample]:
    """As if the model's numbers overflowed for every sequence in which one token occurs."""
    bad = torch.tensor([[POISON in row.tokens] for row in rows])
    return sample(logits.masked_fill(bad, torch.nan), rows, *rest)


@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, temperature=1.0, seed=1, n=2), replace(GREEDY, top_k=3)])
async def test_a_request_without_numbers_ends_with_an_error_and_leaves_its_neighbours_and_no_cache(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, params: SamplingParams
) -> None:
    sick, healthy = [*range(30, 60), POISON], [*range(80, 120)]
    async with _running(tiny) as engine:
        alone = await ask(engine, healthy, params)
    async with _running(tiny) as engine, asyncio.timeout(10):
        with monkeypatch.context() as patched:
            patched.setattr("engine.model_runner.sample", _poisoned)
            error, answer = await asyncio.gather(
                ask(engine, sick, params, "a"), ask(engine, healthy, params, "b"), return_exceptions=True
            )
        assert isinstance(error, NumericalError)
        assert isinstance(answer, Answer)
        assert answer.tokens == alone.tokens
        assert engine.is_healthy()
        assert engine.stats().used_blocks == 0
        assert (await ask(engine, sick, params, "c")).cached_tokens == 0  # what it had computed is not trusted
        assert (await ask(engine, healthy, params, "d")).cached_tokens > 0


HIDDEN_STATES = Decoder.hidden_states


def _overflowing(decoder: Decoder, batch: ForwardBatch, cache: KVCache) -> Tensor:
    """The same for a model whose states overflow for those tokens, and for all that follow in their step."""
    states = HIDDEN_STATES(decoder, batch, cache)
    owners = torch.searchsorted(batch.query_start, batch.output_rows, right=True) - 1
    sick = torch.tensor([POISON in batch.tokens[first:last] for first, last in pairwise(batch.query_start.tolist())])
    return states.masked_fill(sick[owners].unsqueeze(1), torch.nan)


@pytest.mark.parametrize(
    ("params", "place"),
    [({"pooling": "mean"}, 3), ({"pooling": "mean"}, -1), ({"pooling": "last"}, -1), ({"prompt_logprobs": 0}, 3)],
)
async def test_a_prompt_without_numbers_ends_with_an_error_and_leaves_its_neighbours_and_no_cache(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], place: int
) -> None:
    monkeypatch.setattr(Decoder, "hidden_states", _overflowing)
    sick, healthy = [*range(30, 70)], [*range(80, 120)]
    sick[place] = POISON
    wanted = SamplingParams(max_tokens=0, **params)
    async with _running(tiny, max_num_batched_tokens=24) as engine, asyncio.timeout(10):
        error, answer = await asyncio.gather(
            ask(engine, sick, wanted, "a"), ask(engine, healthy, wanted, "b"), return_exceptions=True
        )
        assert isinstance(error, NumericalError)
        assert isinstance(answer, Answer)
        assert engine.is_healthy()
        assert engine.stats().used_blocks == 0
        monkeypatch.undo()
        cached = [(await ask(engine, prompt, GREEDY, "c")).cached_tokens for prompt in ([*sick[:-1], 1], healthy)]
        assert cached == [0, 32]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
async def test_a_step_that_does_not_fit_into_memory_ends_those_who_run_and_no_others(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    execute, calls = ModelRunner.execute, 0

    def exhausted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error
        return execute(*arguments)

    monkeypatch.setattr(ModelRunner, "execute", exhausted)
    prompts = [[*range(first, first + 20)] for first in (10, 40, 70)]
    async with _running(tiny, max_num_seqs=2) as engine, asyncio.timeout(10):
        asked = (ask(engine, prompt, GREEDY, f"{i}") for i, prompt in enumerate(prompts))
        *running, waiting = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(one, OutOfMemoryError) for one in running)
        assert isinstance(waiting, Answer)
        assert engine.is_healthy()
        assert engine.stats().used_blocks == 0
        again = await ask(engine, prompts[0], GREEDY, "again")
        assert again.cached_tokens == 0
        assert len(again.tokens[0]) == 16
