"""The engine as its clients see it: submit a prompt, iterate over what comes out, abort at any moment.

One asyncio task runs the loop schedule → execute → update → deliver; only `execute` leaves the event loop, for a worker
thread. The loop sleeps while there is no work and never waits for a client.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.config import EngineConfig
from engine.engine_info import EngineInfo
from engine.engine_stats import EngineStats
from engine.errors import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    NumericalError,
    OctavoError,
    OutOfMemoryError,
    RequestTimeoutError,
)
from engine.grammar_compiler import GrammarCompiler
from engine.kv_policies.policy import KVPolicy
from engine.memory import is_out_of_memory
from engine.model_runner import ModelRunner, StepResult
from engine.observer import EngineObserver
from engine.prompt_outputs import is_broken
from engine.request_checks import RequestChecks, is_endless
from engine.request_state import RequestState, RequestStream
from engine.sampler import Sample, SampleRow
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from scheduler.batch import ScheduledBatch
from scheduler.kv_budget import Selection
from scheduler.scheduler import Scheduler

logger = logging.getLogger("octavo.engine")

STALL_SECONDS = 120.0
"""A step that takes longer will never end: a whole prompt of a large model on a slow CPU takes a few seconds."""

_FAILED = "the engine has failed; see the server's log"


class AsyncEngine:
    """Serves requests from one model. Everything but the model's step runs on the event loop that called `start`.

    Raises ConfigError if this model cannot be run under the default KV policy.
    """

    def __init__(
        self,
        config: EngineConfig,
        info: EngineInfo,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        runner: ModelRunner,
        *,
        default_sampling: Mapping[str, float] | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        self.config = config
        self.info = info
        self.default_sampling: Mapping[str, float] = default_sampling or {}
        """What the checkpoint's generation_config.json recommends, under the names of `SamplingParams`."""
        self.tokenizer = tokenizer
        self.observer: EngineObserver = observer or EngineObserver()
        self._scheduler = scheduler
        self._checks = RequestChecks(info, tokenizer, scheduler)
        self._runner = runner
        self.grammars = GrammarCompiler(tokenizer, info.vocab_size)
        self._states: dict[str, RequestState] = {}
        self._seeds = random.Random(config.seed)
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failed = False
        self._step_began: float | None = None
        try:
            self._checks.budget(config.kv_policy)
        except InvalidRequestError as error:
            raise ConfigError(f"--kv-policy: {error}") from None

    @property
    def model_name(self) -> str:
        """What the model is called unless the server is told otherwise."""
        return self.info.model_name

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together, at most."""
        return self.info.max_model_len

    @property
    def hidden_size(self) -> int:
        """Numbers of an embedding."""
        return self.info.hidden_size

    # What clients call

    async def start(self) -> None:
        """Begin to serve. Raises RuntimeError if it serves already."""
        if self._task is not None:
            raise RuntimeError("the engine has been started already")
        self._task = asyncio.create_task(self._run(), name="octavo-engine")

    async def stop(self) -> None:
        """End the loop; whatever is still open is aborted."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for state in list(self._states.values()):
            self._abort(state)
        self.grammars.close()
        self._scheduler.close()

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        cache_salt: str | None = None,
        priority: int = 0,
        tenant: str = "",
        timeout: float | None = None,
        kv_policy: KVPolicy | None = None,
    ) -> RequestStream:
        """Queue a prompt (token ids) without waiting for anything.

        ``priority`` and ``tenant`` count under the orders that know them (--scheduling); after ``timeout`` seconds
        the request ends with a RequestTimeoutError, wherever it is. ``kv_policy`` says which tokens keep their KV; the
        engine's own (--kv-policy) by default. Where ``params`` has a grammar, await ``grammars.compile`` before, or
        everybody waits while it is compiled here.

        Raises InvalidRequestError if the request can never be served, EngineDeadError if the engine has failed.
        """
        if not self.is_ready():
            raise EngineDeadError(_FAILED if self._failed else "the engine is not running")
        if request_id in self._states:
            raise InvalidRequestError(f"request id {request_id!r} is in use", param="request_id")
        now = time.monotonic()
        policy = kv_policy or self.config.kv_policy
        request = self._checks.request(
            prompt,
            params,
            policy,
            request_id,
            cache_salt=cache_salt,
            priority=priority,
            tenant=tenant,
            deadline=None if timeout is None else now + timeout,
        )
        matchers = [] if params.grammar is None else self.grammars.matchers(params.grammar, params.width)
        stream = RequestStream(request_id, len(prompt), lambda: self._abort(state))
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(64)
        state = RequestState(request, params, policy, seed, self.tokenizer, stream, matchers)
        self._states[request_id] = state
        self._scheduler.add(request, now)
        self._wake.set()
        return stream

    def is_healthy(self) -> bool:
        """Whether the loop has not failed, and no step has been under way for longer than any takes."""
        stalled = self._step_began is not None and time.monotonic() - self._step_began > STALL_SECONDS
        return not self._failed and not stalled

    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return not self._failed and self._task is not None and not self._task.done()

    def stats(self) -> EngineStats:
        """How much is going on right now."""
        pool, host = self._scheduler.pool, self._scheduler.host_pool
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_queued=self._scheduler.num_queued,
            num_queued_tokens=self._scheduler.num_queued_tokens,
            used_blocks=pool.num_used,
            num_blocks=pool.num_blocks,
            block_size=self._scheduler.config.block_size,
            used_host_blocks=0 if host is None else host.num_used,
            num_host_blocks=0 if host is None else host.num_blocks,
        )

    def slots_by_policy(self) -> Mapping[str, int]:
        """KV slots that running sequences hold now, by their policy's name; what several share counts for each."""
        slots: Counter[str] = Counter()
        for state in self._states.values():
            slots[state.policy.name] += state.num_slots
        return slots

    def is_endless(self, policy: KVPolicy) -> bool:
        """Whether a request under the policy may go on past the context length."""
        return is_endless(policy)

    def _abort(self, state: RequestState) -> None:
        request_id = state.request.request_id
        if self._states.get(request_id) is state:  # a later request may have the id of one that has ended
            del self._states[request_id]
            self._scheduler.abort(state.request)
            state.end("abort", self.observer)
            self._wake.set()

    # The loop

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        worker = ThreadPoolExecutor(1, thread_name_prefix="octavo-model")
        try:
            while True:
                self._expire()
                if not self._scheduler.has_work:
                    self._scheduler.check()  # a block left behind is a failure, not a leak
                    await self._sleep(until=None)
                    continue
                batch, rows = self._prepare()
                policies = self._policies(batch)
                if not batch:
                    await self._sleep(until=self._scheduler.next_event())
                    continue
                self._step_began = time.monotonic()
                try:
                    result = await loop.run_in_executor(
                        worker, self._runner.execute, batch, rows, policies, self._observed(batch)
                    )
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    self._lose_step(batch, error)
                else:
                    self._finish_step(batch, result)
                finally:
                    self._step_began = None
                # Let the clients' tasks send what they got before the next step takes all cores again: a model thread
                # that loses its core in mid-step keeps the others waiting for it at every barrier.
                await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 — whatever it is, no request may hang on a dead loop
            self._fail(error)
        finally:
            self._step_began = None
            worker.shutdown(wait=False)  # a step under way ends in its thread; waiting here would block the event loop

    def _policies(self, batch: ScheduledBatch) -> dict[str, KVPolicy]:
        """Of the requests whose policy selects, by id."""
        ids = [item.sequence.request.request_id for item in batch.items if isinstance(item.kv_budget, Selection)]
        return {request_id: self._states[request_id].policy for request_id in ids}

    def _observed(self, batch: ScheduledBatch) -> dict[str, SamplingParams]:
        """What the requests ask for of whose prompts the step observes positions, by id."""
        ids = [item.sequence.request.request_id for item in batch.items if item.observed]
        return {request_id: self._states[request_id].params for request_id in ids}

    async def _sleep(self, until: float | None) -> None:
        """Until a request comes or goes, or that time is reached."""
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), None if until is None else max(until - time.monotonic(), 0))

    def _expire(self) -> None:
        for request in self._scheduler.expire(time.monotonic()):
            state = self._states.pop(request.request_id)
            queued = request.cached_tokens is None
            message = "the time limit was up before the request could begin" if queued else "the time limit was up"
            state.end("timeout", self.observer, RequestTimeoutError(message, queued=queued))

    def _prepare(self) -> tuple[ScheduledBatch, list[SampleRow]]:
        counters = self._scheduler.counters
        queried, hit = counters.prefix_queried_tokens, counters.prefix_hit_tokens
        batch = self._scheduler.schedule(time.monotonic())
        if counters.prefix_queried_tokens > queried:
            self.observer.on_prefix_cache(
                queried_tokens=counters.prefix_queried_tokens - queried, hit_tokens=counters.prefix_hit_tokens - hit
            )
        if batch.num_preempted:
            self.observer.on_preemption(batch.num_preempted)
        if batch.transfers.out or batch.transfers.back:
            self.observer.on_swap(out=len(batch.transfers.out), back=len(batch.transfers.back))
        for sequence, count in batch.evicted:
            self._states[sequence.request.request_id].evict(count, self.observer)
        now = time.perf_counter()
        rows: list[SampleRow] = []
        for item in batch.items:
            state = self._states[item.sequence.request.request_id]
            if state.first_step is None:
                state.begin(now)
                self.observer.on_tokens(prompt=state.request.num_prompt_tokens, generated=0)
            rows += state.rows(item.sequence, item.num_samples)
        return batch, rows

    def _lose_step(self, batch: ScheduledBatch, error: Exception) -> None:
        """A step did not fit into memory: give up all that had KV, and go on with those that wait."""
        logger.error("out of memory in a step of %d tokens: %s", batch.num_tokens, error)
        for request in self._scheduler.discard(batch):
            state = self._states.pop(request.request_id)
            state.end("error", self.observer, OutOfMemoryError("the server ran out of memory: try again"))

    def _fail_broken(self, batch: ScheduledBatch, result: StepResult) -> None:
        """End the requests for which the model gave no numbers; nothing that they computed may be reused."""
        broken_prompts = {index for index, output in result.prompts.items() if is_broken(output)}
        for index, (item, group) in enumerate(zip(batch.items, result.samples, strict=True)):
            request = item.sequence.request
            if index not in broken_prompts and not any(sample.broken for sample in group):
                continue
            if (state := self._states.get(request.request_id)) is not None:
                logger.error("request %s: the model's output is not a number", request.request_id)
                self._refuse(state, NumericalError("the model's output is not a number"), tainted=True)

    def _finish_prompts(self, batch: ScheduledBatch, result: StepResult, now: float) -> None:
        """Tell what the prompts gave, and end the requests that want no more."""
        for index, output in result.prompts.items():
            item = batch.items[index]
            if (state := self._states.get(item.sequence.request.request_id)) is not None:  # it may have gone meanwhile
                state.observe(item.observed, output)
        for item in batch.items:
            request = item.sequence.request
            if request.stop.max_tokens == 0 and item.sequence.finish_reason == "length":
                self._states.pop(request.request_id).finish_prompt(now, self.observer)

    def _finish_step(self, batch: ScheduledBatch, result: StepResult) -> None:
        samples = result.samples
        self._fail_broken(batch, result)
        appended = self._scheduler.update(batch, [[sample.token for sample in group] for group in samples])
        now = time.perf_counter()
        self._finish_prompts(batch, result, now)
        for new in appended:
            request_id = new.sequence.request.request_id
            state = self._states.get(request_id)
            if state is None:  # another of its continuations has just failed
                continue
            failure = state.grammar_failure(new.sequence)
            if failure is not None:
                self._refuse(state, InvalidRequestError(f"the output could not be constrained to the end: {failure}"))
            elif state.deliver(new.sequence, samples[new.item][new.sample], now, self.observer):
                self._scheduler.finish(new.sequence, "stop")
            if state.ended:
                self._states.pop(request_id, None)
        found = self._advance_beams(batch, samples, now)
        self._observe_step(batch, len(appended) + found)

    def _refuse(self, state: RequestState, error: OctavoError, *, tainted: bool = False) -> None:
        """End a request that cannot go on as its client asked; see `Scheduler.abort`."""
        del self._states[state.request.request_id]
        self._scheduler.abort(state.request, tainted=tainted)
        state.end("error", self.observer, error)

    def _advance_beams(self, batch: ScheduledBatch, samples: list[list[Sample]], now: float) -> int:
        """Let the beam searches of the step go on; returns the tokens of those that ended."""
        found = 0
        for item, group in zip(batch.items, samples, strict=True):
            beam = item.sequence
            if not beam.parked:
                continue
            state = self._states[beam.request.request_id]
            assert state.beams is not None
            if not state.beams.bring(beam, group[0].candidates):
                continue
            state.observe_beams(now, self.observer)
            if state.beams.advance(self._scheduler):
                found += state.deliver_beams(now, self.observer)
                del self._states[beam.request.request_id]
        return found

    def _observe_step(self, batch: ScheduledBatch, generated: int) -> None:
        self.observer.on_tokens(prompt=0, generated=generated)
        stats = self.stats()
        self.observer.on_step(
            scheduled_tokens=batch.num_tokens,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_usage=stats.kv_usage,
        )

    def _fail(self, error: Exception) -> None:
        """The loop is dead: say so, and leave no client waiting."""
        logger.exception("the engine's loop failed", exc_info=error)
        self._failed = True
        states = list(self._states.values())
        self._states.clear()
        for state in states:
            state.end("error", self.observer, EngineDeadError(_FAILED))
        try:
            for state in states:
                self._scheduler.abort(state.request)
        except Exception:  # it may be what has failed
            logger.exception("what the failed requests held cannot be freed")
