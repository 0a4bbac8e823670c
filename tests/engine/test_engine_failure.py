"""A fault of the scheduler is a failure of the engine: found when it idles, logged, and told to every client."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.errors import EngineDeadError, RequestTimeoutError
from engine.launch import LoadedModel, assemble
from scheduler.kv_memory import KVMemory
from scheduler.scheduler import Scheduler
from tests.engine.driving import GREEDY, ask, until


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
