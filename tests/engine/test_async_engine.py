"""The engine's promises to its clients: what comes out, when it ends, and that nothing is left behind."""

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import pytest

from engine import async_engine
from engine.async_engine import AsyncEngine
from engine.beam_search import BeamParams
from engine.config import EngineConfig
from engine.errors import EngineDeadError, InvalidRequestError, RequestTimeoutError
from engine.launch import LoadedModel, assemble
from engine.model_runner import ModelRunner
from engine.observer import EngineObserver, RequestRecord
from engine.outputs import Output
from engine.request_state import RequestStream
from engine.sampling_params import SamplingParams
from tests.engine.driving import GREEDY, ask, ask_all, until

_PROMPTS = [[5 + i % 7 + j for j in range(3 + 4 * i)] for i in range(12)]
_SMALL = 9 * 16 * 3 * 2 * 2 * 16 * 4
"""Bytes of a KV cache of nine blocks."""
_SAMPLED = SamplingParams(temperature=1.0, max_tokens=12, seed=4, ignore_eos=True)


class _Running:
    """An engine for the length of a with-block."""

    def __init__(self, loaded: LoadedModel, **limits: Any) -> None:
        self.engine = assemble(EngineConfig(**{"kv_cache_memory": 1 << 24, **limits}), loaded)

    async def __aenter__(self) -> AsyncEngine:
        await self.engine.start()
        return self.engine

    async def __aexit__(self, *error: object) -> None:
        await self.engine.stop()


async def _read(stream: RequestStream) -> list[Output]:
    return [output async for output in stream]


def _is_idle(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return (stats.num_running, stats.num_waiting, stats.used_blocks, stats.kv_usage) == (0, 0, 0, 0.0)


@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 3}, {"kv_cache_memory": _SMALL}], ids=str)
@pytest.mark.parametrize("logprobs", [None, 2])
async def test_the_likeliest_continuations_by_token_come_out_whole_and_best_first(
    tiny: LoadedModel, logprobs: int | None, limits: dict[str, Any]
) -> None:
    ends = SamplingParams(temperature=2.0, max_tokens=9, seed=3, stop_token_ids=tuple(range(60, 120)), logprobs=2)
    async with _Running(tiny, **limits) as engine:
        every = await ask(engine, _PROMPTS[4], dataclasses.replace(ends, n=8))
        stream = engine.submit(
            _PROMPTS[4], dataclasses.replace(ends, n=3, best_of=8, logprobs=logprobs), request_id="best"
        )
        outputs = await _read(stream)
    own = {index: [one for o in every.outputs if o.index == index for one in o.logprobs] for index in range(8)}
    totals = {index: sum(one.logprob for one in tokens) for index, tokens in own.items()}
    best = sorted(range(8), key=lambda index: -totals[index] / len(own[index]))
    assert best[:3] != sorted(totals, key=lambda index: -totals[index])[:3], "not the likeliest as a whole"
    assert best[:3] != sorted(best[:3]), "not as they were begun"
    assert [output.index for output in outputs] == [0, 1, 2]
    assert [list(output.token_ids) for output in outputs] == [every.tokens[index] for index in best[:3]]
    assert [output.text for output in outputs] == [every.text[index] for index in best[:3]]
    assert [list(output.logprobs) for output in outputs] == [own[index] if logprobs else [] for index in best[:3]]
    assert stream.generated_tokens == sum(map(len, every.tokens.values()))


async def test_as_many_as_are_made_come_as_they_are_made(tiny: LoadedModel) -> None:
    async with _Running(tiny) as engine:
        plain = await ask(engine, _PROMPTS[4], dataclasses.replace(_SAMPLED, n=3))
        best = await ask(engine, _PROMPTS[4], dataclasses.replace(_SAMPLED, n=3, best_of=3))
    assert best.outputs == plain.outputs


async def test_the_tokens_of_beams_that_are_not_shown_count_too(tiny: LoadedModel) -> None:
    params = SamplingParams(max_tokens=5, n=1, best_of=4, beams=BeamParams(), ignore_eos=True, logprobs=2)
    async with _Running(tiny) as engine:
        stream = engine.submit(_PROMPTS[4], params, request_id="a")
        (output,) = await _read(stream)
    assert (len(output.token_ids), stream.generated_tokens) == (5, 20)
    assert [len(one.top) for one in output.logprobs] == [2] * 5


@pytest.mark.parametrize("beams", [None, BeamParams()], ids=["best of", "beams"])
async def test_what_is_aborted_before_the_best_are_known_leaves_nothing_behind(
    tiny: LoadedModel, beams: BeamParams | None
) -> None:
    params = SamplingParams(max_tokens=200, best_of=4, beams=beams, ignore_eos=True)
    async with _Running(tiny) as engine:
        stream = engine.submit([3, 4, 5], params, request_id="a")
        await until(lambda: engine.stats().num_running == 4)
        stream.abort()
        assert _is_idle(engine)
        assert await _read(stream) == []
        await ask(engine, [1, 2], GREEDY)


async def test_a_second_turn_does_not_recompute_the_first(tiny: LoadedModel) -> None:
    class Computed(EngineObserver):
        tokens = 0

        def on_step(self, *, scheduled_tokens: int, num_running: int, num_waiting: int, kv_usage: float) -> None:
            self.tokens += scheduled_tokens

    first, once = _PROMPTS[-1], dataclasses.replace(GREEDY, max_tokens=1)
    async with _Running(tiny) as engine:
        answer = (await ask(engine, first, GREEDY)).tokens[0]
        engine.observer = computed = Computed()
        second = [*first, *answer, 40, 41, 42]
        again = await ask(engine, second, once)
    known = (len(first) + len(answer) - 1) // 16 * 16  # whole blocks; the last token's KV was never computed
    assert known > len(first) // 16 * 16, "some of the answer's tokens are among them"
    assert (again.cached_tokens, computed.tokens) == (known, len(second) - known)
    async with _Running(tiny, prefix_caching=False) as engine:
        assert (await ask(engine, second, once)).tokens == again.tokens


async def test_a_prefix_that_the_device_has_forgotten_comes_back_from_the_host(tiny: LoadedModel) -> None:
    async with _Running(tiny, kv_cache_memory=_SMALL, swap_memory=8 * _SMALL) as engine:
        first = await ask(engine, _PROMPTS[-1], GREEDY)
        await ask_all(engine, _PROMPTS[:-1], GREEDY)
        again = await ask(engine, _PROMPTS[-1], GREEDY)
        assert (first.cached_tokens, again.cached_tokens) == (0, 32)
        assert again.tokens == first.tokens


async def test_a_request_ends_at_its_deadline_wherever_it_is(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = ModelRunner.execute
    monkeypatch.setattr(ModelRunner, "execute", lambda *step: time.sleep(0.002) or execute(*step))
    long = dataclasses.replace(GREEDY, max_tokens=200)
    async with _Running(tiny, max_num_seqs=1, queue_timeout=0.04) as engine:
        running = engine.submit([1, 2], long, request_id="a", timeout=0.25)
        await anext(running)
        waiting = engine.submit([1, 2], long, request_id="b")
        with pytest.raises(RequestTimeoutError, match="before the request could begin") as caught:
            await anext(waiting)
        assert caught.value.queued
        with pytest.raises(RequestTimeoutError, match="the time limit was up") as caught:
            await _read(running)
        assert not caught.value.queued
        assert _is_idle(engine)


async def test_a_batch_that_waits_to_fill_begins_when_its_delay_is_over(tiny: LoadedModel) -> None:
    async with _Running(tiny, batching="dynamic", batch_delay=0.05) as engine:
        began = time.monotonic()
        await ask(engine, [1, 2], dataclasses.replace(GREEDY, max_tokens=1))
        assert time.monotonic() - began >= 0.05


async def test_a_small_cache_preempts_and_a_prefix_is_reused(tiny: LoadedModel) -> None:
    class Counts(EngineObserver):
        preempted = hit = 0

        def on_preemption(self, count: int) -> None:
            self.preempted += count

        def on_prefix_cache(self, *, queried_tokens: int, hit_tokens: int) -> None:
            self.hit += hit_tokens

    async with _Running(tiny, kv_cache_memory=_SMALL) as engine:
        engine.observer = counts = Counts()
        first = await ask(engine, _PROMPTS[-1], GREEDY)
        again = await ask(engine, _PROMPTS[-1], GREEDY)
        assert (first.cached_tokens, again.cached_tokens, counts.hit) == (0, 32, 32)
        assert again.tokens == first.tokens
        await ask_all(engine, _PROMPTS, dataclasses.replace(GREEDY, max_tokens=30))
        assert counts.preempted > 0
        assert _is_idle(engine)


async def test_continuations_with_a_seed_differ_from_each_other_but_not_from_run_to_run(tiny: LoadedModel) -> None:
    params = dataclasses.replace(_SAMPLED, n=3)
    async with _Running(tiny) as engine:
        one, other = await ask(engine, _PROMPTS[3], params), await ask(engine, _PROMPTS[3], params)
    assert one.tokens == other.tokens
    assert len({tuple(tokens) for tokens in one.tokens.values()}) == 3


async def test_without_a_seed_answers_differ(tiny: LoadedModel) -> None:
    params = dataclasses.replace(_SAMPLED, seed=None)
    async with _Running(tiny) as engine:
        answers = [tuple((await ask(engine, _PROMPTS[3], params)).tokens[0]) for _ in range(4)]
    assert len(set(answers)) == 4


async def test_each_continuation_ends_once_with_a_reason(tiny: LoadedModel) -> None:
    async with _Running(tiny) as engine:
        answer = await ask(engine, _PROMPTS[2], dataclasses.replace(_SAMPLED, n=4))
    ends = [(output.index, output.finish_reason) for output in answer.outputs if output.finish_reason]
    assert sorted(ends) == [(index, "length") for index in range(4)]
    assert all(len(tokens) == 12 for tokens in answer.tokens.values())


async def test_eos_ends_an_answer_unless_it_is_ignored(tiny: LoadedModel) -> None:
    to_eos = SamplingParams(temperature=0.0, max_tokens=9, logit_bias={2: 100.0})
    async with _Running(tiny) as engine:
        ended = await ask(engine, _PROMPTS[1], to_eos)
        ignored = await ask(engine, _PROMPTS[1], dataclasses.replace(to_eos, ignore_eos=True))
        later = await ask(engine, _PROMPTS[1], dataclasses.replace(to_eos, min_tokens=4))
    assert [(a.tokens[0], a.outputs[-1].finish_reason) for a in (ended, ignored)] == [
        ([2], "stop"),
        ([2] * 9, "length"),
    ]
    assert (len(later.tokens[0]), later.tokens[0].count(2)) == (5, 1)
    assert (ended.text[0], ended.outputs[-1].stop_reason) == ("", None)


async def test_a_stop_token_and_a_stop_string_end_an_answer_and_are_named(tiny: LoadedModel) -> None:
    async with _Running(tiny) as engine:
        plain = await ask(engine, _PROMPTS[4], GREEDY)
        token = plain.tokens[0][5]
        first = plain.tokens[0].index(token)
        by_id = await ask(engine, _PROMPTS[4], dataclasses.replace(GREEDY, stop_token_ids=(token,)))
        assert by_id.tokens[0] == plain.tokens[0][: first + 1]
        assert (by_id.outputs[-1].finish_reason, by_id.outputs[-1].stop_reason) == ("stop", token)
        word = next(text for text in plain.text[0] if text.isprintable() and text != "�")
        by_text = await ask(engine, _PROMPTS[4], dataclasses.replace(GREEDY, stop=(word,)))
        assert by_text.text[0] == plain.text[0][: plain.text[0].index(word)]
        assert (by_text.outputs[-1].finish_reason, by_text.outputs[-1].stop_reason) == ("stop", word)
        assert _is_idle(engine)


async def test_logprobs_come_with_every_token(tiny: LoadedModel) -> None:
    async with _Running(tiny) as engine:
        answer = await ask(engine, _PROMPTS[4], dataclasses.replace(GREEDY, logprobs=2))
    for output in answer.outputs:
        (logprob,) = output.logprobs
        assert logprob.token_id == output.token_ids[0] == logprob.top[0][0], "greedy takes the most likely"


async def test_an_abort_ends_the_stream_and_frees_everything_while_others_go_on(tiny: LoadedModel) -> None:
    async with _Running(tiny, max_num_seqs=2) as engine:
        alone = await ask(engine, _PROMPTS[5], _SAMPLED)
        running = engine.submit(_PROMPTS[6], dataclasses.replace(GREEDY, max_tokens=200), request_id="running")
        kept = asyncio.create_task(ask(engine, _PROMPTS[5], _SAMPLED, "kept"))
        await anext(running)
        queued = engine.submit(_PROMPTS[7], GREEDY, request_id="queued")
        queued.abort()
        running.abort()
        running.abort()
        assert [output async for output in queued] == []
        assert len([output async for output in running]) <= 2, "what was already on its way may still be read"
        assert (await kept).tokens == alone.tokens
        assert _is_idle(engine)


async def test_an_abort_before_the_first_step_leaves_an_idle_engine_serving(tiny: LoadedModel) -> None:
    async with _Running(tiny) as engine:
        engine.submit(_PROMPTS[0], GREEDY, request_id="x").abort()
        await asyncio.sleep(0.01)
        assert (engine.is_healthy(), _is_idle(engine)) == (True, True)
        assert len((await ask(engine, _PROMPTS[0], GREEDY)).tokens[0]) == 16


async def test_an_abort_of_an_ended_request_leaves_a_later_one_of_its_name_alone(tiny: LoadedModel) -> None:
    async with _Running(tiny) as engine:
        ended = engine.submit(_PROMPTS[0], GREEDY, request_id="x")
        assert len([output async for output in ended]) == 16
        later = asyncio.create_task(ask(engine, _PROMPTS[0], GREEDY, "x"))
        await asyncio.sleep(0)
        ended.abort()
        assert len((await later).tokens[0]) == 16


async def test_an_eos_that_the_model_does_not_have_harms_nobody(tiny: LoadedModel) -> None:
    async with _Running(tiny) as engine:
        engine.tokenizer = dataclasses.replace(engine.tokenizer, eos_token_ids=frozenset({2, 400}))
        answer = await ask(engine, _PROMPTS[0], SamplingParams(min_tokens=2, max_tokens=4, seed=1))
    assert len(answer.tokens[0]) > 2


async def test_stopping_in_mid_step_does_not_hold_up_the_event_loop(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = ModelRunner.execute

    def slow(*arguments: Any) -> Any:
        time.sleep(0.3)
        return execute(*arguments)

    async with _Running(tiny) as engine:
        monkeypatch.setattr(ModelRunner, "execute", slow)
        engine.submit(_PROMPTS[0], GREEDY, request_id="x")
        await asyncio.sleep(0.02)
        began = time.perf_counter()
        await engine.stop()
        assert time.perf_counter() - began < 0.1
    await asyncio.sleep(0.3)


async def test_a_step_that_never_ends_is_unhealthy(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(ModelRunner, "execute", lambda *_: time.sleep(0.2) or [[]])
    async with _Running(tiny) as engine:
        assert engine.is_healthy()
        engine.submit(_PROMPTS[0], GREEDY, request_id="x")
        await asyncio.sleep(0.12)
        assert not engine.is_healthy()


async def test_starting_twice_is_an_error(tiny: LoadedModel) -> None:
    async with _Running(tiny) as engine:
        with pytest.raises(RuntimeError, match="started already"):
            await engine.start()


async def test_stopping_the_engine_ends_every_stream(tiny: LoadedModel) -> None:
    async with _Running(tiny) as engine:
        stream = engine.submit(_PROMPTS[6], dataclasses.replace(GREEDY, max_tokens=200), request_id="a")
        await anext(stream)
    async with asyncio.timeout(5):
        assert [output.finish_reason async for output in stream if output.finish_reason] == []
    with pytest.raises(EngineDeadError, match="not running"):
        engine.submit(_PROMPTS[6], GREEDY, request_id="b")


async def test_a_failing_step_fails_open_requests_and_health_and_leaves_nobody_waiting(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    async with _Running(tiny) as engine:
        monkeypatch.setattr(ModelRunner, "execute", fail)
        async with asyncio.timeout(5):
            with pytest.raises(EngineDeadError, match="the engine has failed"):
                await ask(engine, _PROMPTS[0], GREEDY)
        assert (engine.is_healthy(), engine.is_ready()) == (False, False)
        with pytest.raises(EngineDeadError, match="the engine has failed"):
            engine.submit(_PROMPTS[0], GREEDY, request_id="b")
        assert _is_idle(engine)


@pytest.mark.parametrize(
    ("prompt", "params", "param", "message"),
    [
        ([], {}, "prompt", "the prompt is empty"),
        ([5, 320], {}, "prompt", "token id 320 is outside the vocabulary of 320"),
        ([-1], {}, "prompt", "token id -1"),
        ([5] * 256, {}, "prompt", "context length is 256 tokens; the prompt has 256"),
        ([5] * 200, {"max_tokens": 57}, "prompt", "the prompt has 200 and 57 output tokens were asked for"),
        ([5], {"max_tokens": 3, "min_tokens": 4}, "min_tokens", "min_tokens is more than max_tokens"),
        ([5], {"logit_bias": {999: 1.0}}, "logit_bias", "token id 999"),
        ([5], {"stop_token_ids": (-7,)}, "stop_token_ids", "token id -7"),
        ([5], {"n": 0}, "n", "n must be at least 1"),
        ([5], {"logprobs": 321}, "logprobs", "logprobs must be from 0 to 320"),
        ([5], {"n": 65}, "n", "65 sequences are more than the 64"),
        ([5], {"best_of": 65}, "best_of", "65 sequences are more than the 64"),
        ([5], {"best_of": 65, "beams": BeamParams()}, "best_of", "65 sequences are more than the 64"),
        ([5], {"n": 3, "best_of": 2}, "best_of", r"best_of must be at least n \(3\)"),
    ],
)
async def test_a_request_that_can_never_be_served_is_refused_with_the_field_at_fault(
    tiny: LoadedModel, prompt: Sequence[int], params: dict[str, Any], param: str, message: str
) -> None:
    async with _Running(tiny) as engine:
        with pytest.raises(InvalidRequestError, match=message) as caught:
            engine.submit(prompt, SamplingParams(**params), request_id="x")
        assert caught.value.param == param
        assert _is_idle(engine)


async def test_a_request_fills_the_context_to_its_last_token(tiny: LoadedModel) -> None:
    async with _Running(tiny) as engine:
        answer = await ask(engine, [5] * 250, SamplingParams(temperature=0.0, ignore_eos=True))
    assert (len(answer.tokens[0]), answer.outputs[-1].finish_reason) == (6, "length")


@pytest.mark.parametrize("beams", [None, BeamParams()], ids=["sampled", "beams"])
async def test_times_add_up(tiny: LoadedModel, beams: BeamParams | None) -> None:
    records: list[RequestRecord] = []

    class Recorder(EngineObserver):
        def on_finish(self, record: RequestRecord) -> None:
            records.append(record)

    async with _Running(tiny) as engine:
        engine.observer = Recorder()
        await ask(engine, _PROMPTS[3], dataclasses.replace(GREEDY, best_of=3 if beams else None, beams=beams))
    (record,) = records
    assert record.queue_seconds is not None
    assert record.prefill_seconds is not None
    assert record.decode_seconds is not None
    assert record.e2e_seconds == pytest.approx(
        record.queue_seconds + record.prefill_seconds + record.decode_seconds, abs=1e-3
    )
    assert record.decode_seconds > 0
    assert record.seconds_per_output_token == pytest.approx(record.decode_seconds / 15)
    assert (record.prompt_tokens, record.generated_tokens, record.finish_reason) == (15, 16, "length")
