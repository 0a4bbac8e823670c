"""The real engine and scheduler around a model that has a script: what is ordered, chosen and refused is real."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import httpx
import torch

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.engine_info import EngineInfo
from engine.kv_policies.policy import KVPolicy
from engine.launch import scheduler_config
from engine.memory import MemoryPlan
from engine.model_runner import StepResult
from engine.sampler import Sample, SampleRow
from engine.sampling_params import SamplingParams
from scheduler.batch import ScheduledBatch, ScheduledSequence
from scheduler.scheduler import Scheduler
from server.config import ServerConfig
from tests.server.conftest import Live, running, wait_until
from tests.server.fakes import byte_tokenizer

_AMPLE = MemoryPlan(num_blocks=256, num_host_blocks=0, max_model_len=512)


Script = Callable[[SampleRow], Sample]
"""What follows a row's tokens."""


def only_a(row: SampleRow) -> Sample:
    """Everybody's next token is the same."""
    del row
    return Sample(token("A"))


def token(character: str) -> int:
    """How the byte tokenizer spells printable ASCII."""
    return ord(character) - ord("!")


class Model:
    """Stands for `ModelRunner`: a step waits while the gate is closed, then takes ``pace`` seconds."""

    def __init__(self, script: Script = only_a) -> None:
        self.script = script
        self.gate = threading.Event()
        self.gate.set()
        self.pace = 0.0
        self.begun: list[str] = []
        """The first two letters of each prompt, in the order in which they were first computed."""
        self.last: tuple[ScheduledSequence, ...] = ()
        """What was computed last."""

    def execute(
        self,
        batch: ScheduledBatch,
        rows: Sequence[SampleRow],
        policies: Mapping[str, KVPolicy],
        observed: Mapping[str, SamplingParams],
    ) -> StepResult:
        """Let each row go on as the script says."""
        self.last = batch.items
        for item in batch.items:
            if item.start == 0 and item.sequence.num_output_tokens == 0:
                self.begun.append(_text(item.tokens[1:3]))
        assert self.gate.wait(10)
        time.sleep(self.pace)
        samples = map(self.script, rows)
        prompts = {index: torch.ones(2).double() for index, item in enumerate(batch.items) if item.observed}
        return StepResult([list(islice(samples, item.num_samples)) for item in batch.items], prompts)


def _text(tokens: Iterable[int]) -> str:
    """The reverse of ``token``."""
    return "".join(chr(token + ord("!")) for token in tokens)


@dataclass
class Stage:
    """A server around the model, and clients that do not wait for their answers."""

    live: Live
    model: Model
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(32))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The step that begins in here, or is under way, does not end before the block does."""
        self.model.gate.clear()
        try:
            yield
        finally:
            self.model.gate.set()

    def post(self, *, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        """Ask, and wait for the answer."""
        return self.live.http.post(
            "/v1/completions", json={"max_tokens": 1, "ignore_eos": True, **body}, headers=headers
        )

    def send(self, **request: Any) -> "Future[httpx.Response]":
        """Ask, and go on as soon as the engine has all the prompts."""
        prompts = request["prompt"]
        expected = self.size + (len(prompts) if isinstance(prompts, list) else 1)
        answer = self.pool.submit(self.post, **request)
        assert wait_until(lambda: self.size == expected or answer.done())
        return answer

    def filled(self, size: int) -> bool:
        """Whether the engine has, or soon gets, so many requests."""
        return wait_until(lambda: self.size == size)

    def drained(self) -> bool:
        """Whether all is done, soon."""
        return wait_until(lambda: self.is_idle)

    @property
    def size(self) -> int:
        """Requests in the engine."""
        stats = self.live.engine.stats()
        return int(stats.num_running + stats.num_waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, waits, holds a block, or is remembered."""
        stats = self.live.engine.stats()
        return self.size == stats.num_queued_tokens == stats.used_blocks == len(self.live.engine._states) == 0


@contextlib.contextmanager
def staged(
    config: ServerConfig | None = None,
    *,
    key: str = "none",
    plan: MemoryPlan = _AMPLE,
    script: Script = only_a,
    **settings: Any,
) -> Iterator[Stage]:
    """A server with a place for one sequence unless ``settings``, those of the engine, say otherwise."""
    model = Model(script)
    engine = _engine(EngineConfig(**{"max_num_seqs": 1, "prefix_caching": False, **settings}), plan, model)
    with running(engine, config or ServerConfig(port=0), key) as live:
        engine.observer = live.metrics
        stage = Stage(live, model)
        with stage.pool:
            yield stage
        assert stage.drained(), "something was left behind"


def _engine(config: EngineConfig, plan: MemoryPlan, model: Model) -> AsyncEngine:
    info = EngineInfo(
        model_name="fake",
        architecture="none",
        dtype="none",
        device="none",
        threads=1,
        vocab_size=258,
        hidden_size=2,
        max_model_len=plan.max_model_len,
        weight_bytes=0,
        num_blocks=plan.num_blocks,
        block_size=config.block_size,
        kv_bytes=0,
        load_seconds=0,
    )
    return AsyncEngine(config, info, byte_tokenizer(), Scheduler(scheduler_config(config, plan)), model)
