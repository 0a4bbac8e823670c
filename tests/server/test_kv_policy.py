"""Each request names how its KV cache is kept small, and is told what came of it."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv_policies.full import Full
from engine.kv_policies.registry import POLICIES, describe, make_policy
from engine.kv_policies.streaming import Streaming
from engine.kv_policies.window import SlidingWindow
from engine.launch import assemble, load_model
from engine.sampler import Sample, SampleRow
from server.config import ServerConfig
from tests.engine.checkpoints import random_model, save
from tests.server.conftest import Live, running, wait_until
from tests.server.fakes import FakeEngine
from tests.server.refusals import check_error
from tests.server.scripted import Stage, only_a, staged, token
from tests.server.test_metrics import samples

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "x"},
    CHAT: {"messages": [{"role": "user", "content": "x"}]},
}
STREAMING = {"type": "streaming", "sinks": 4, "window": 28}
both = pytest.mark.parametrize("path", BODIES)
either = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@pytest.fixture(scope="module")
def shared_stage() -> Iterator[Stage]:
    with staged(max_num_seqs=4) as stage:
        yield stage


@pytest.fixture
def stage(shared_stage: Stage) -> Iterator[Stage]:
    """The real scheduler with a context length of 512 tokens, in blocks of 16; afterwards it must be idle."""
    yield shared_stage
    assert shared_stage.drained()


def ask(live: Live, path: str = COMPLETIONS, **fields: Any) -> Any:
    return live.http.post(path, json={**BODIES[path], "ignore_eos": True, **fields})


def usage(live: Live, path: str = COMPLETIONS, *, stream: bool = False, **fields: Any) -> Any:
    """Of an answer, or of a stream's last chunk."""
    if not stream:
        answer = ask(live, path, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]
    answer = ask(live, path, stream=True, stream_options={"include_usage": True}, **fields)
    *chunks, last, done, _ = answer.text.split("\n\n")
    assert done == "data: [DONE]"
    assert all(json.loads(chunk.removeprefix("data: "))["usage"] is None for chunk in chunks)
    return json.loads(last.removeprefix("data: "))["usage"]


# what a request may say


@both
@either
@pytest.mark.parametrize("given", [*POLICIES, *(describe(cls()) for cls in POLICIES.values()), STREAMING], ids=str)
def test_a_policy_by_name_or_as_an_object_reaches_the_engine(live: Live, path: str, stream: bool, given: Any) -> None:
    assert ask(live, path, kv_policy=given, stream=stream, max_tokens=1).status_code == 200
    assert live.engine.submitted[-1].order["kv_policy"] == make_policy(given)


@both
def test_who_says_nothing_gets_the_servers_default(live: Live, start: Callable[..., Live], path: str) -> None:
    other = start(FakeEngine(config=EngineConfig(kv_policy=Streaming(window=9))))
    for server, default in ((live, Full()), (other, Streaming(window=9))):
        for fields in ({}, {"kv_policy": None}):
            assert ask(server, path, max_tokens=1, **fields).status_code == 200
            assert server.engine.submitted[-1].order["kv_policy"] == default
    assert ask(other, path, max_tokens=1, kv_policy="full").status_code == 200
    assert other.engine.submitted[-1].order["kv_policy"] == Full()


@both
def test_a_refusal_is_in_the_policys_own_words(live: Live, path: str) -> None:
    for given, words in (
        ("h9", "kv_policy: there is no policy 'h9'"),
        ({"type": "streaming", "window": 10**30}, "kv_policy: window must be a whole number from 0 to 2147483647"),
        ({"type": "streaming", "sinks": 0}, "kv_policy: streaming needs at least 1 sink"),
    ):
        error = check_error(ask(live, path, kv_policy=given), 400)
        assert error["param"] == "kv_policy"
        assert error["message"].startswith(words)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(live: Live, number: str) -> None:
    body = f'{{"prompt": "x", "kv_policy": {{"type": "streaming", "window": {number}}}}}'
    answer = live.http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert check_error(answer, 400)["message"] == "kv_policy: its numbers must be finite"


@both
def test_a_window_wider_than_the_context_is_refused(stage: Stage, path: str) -> None:
    largest = {"type": "window", "window": 2**31 - 1}
    for given in (largest, {"type": "window", "window": 513}, {"type": "streaming", "sinks": 2**31 - 1}):
        error = check_error(ask(stage.live, path, kv_policy=given), 400)
        assert error["param"] == "kv_policy"
        assert "the model's context length, 512" in error["message"]
    assert ask(stage.live, path, kv_policy={"type": "window", "window": 512}, max_tokens=1).status_code == 200


# what the server lets it say


@both
def test_only_the_allowed_policies_may_be_named_and_the_default(start: Callable[..., Live], path: str) -> None:
    engine = FakeEngine(config=EngineConfig(kv_policy="streaming"))
    live = start(engine, ServerConfig(port=0, kv_policy_allow=("window",)))
    error = check_error(ask(live, path, kv_policy="full"), 400)
    assert error["param"] == "kv_policy"
    assert error["message"] == "kv_policy: 'full' is not allowed here, but 'streaming', 'window'"
    assert not engine.submitted
    for given in ("window", "streaming", STREAMING):
        assert ask(live, path, max_tokens=1, kv_policy=given).status_code == 200
        assert engine.submitted[-1].order["kv_policy"] == make_policy(given)
    assert ask(live, path, max_tokens=1).status_code == 200
    assert engine.submitted[-1].order["kv_policy"] == Streaming()


def test_a_policy_that_there_is_not_cannot_be_allowed() -> None:
    with pytest.raises(ConfigError, match="--kv-policy-allow: there is no policy 'h9', but 'full'"):
        ServerConfig(kv_policy_allow=("window", "h9"))


def test_a_default_that_the_model_cannot_have_ends_the_start() -> None:
    with (
        pytest.raises(ConfigError, match=r"--kv-policy: the KV policy keeps 1024 tokens, .* length, 512"),
        staged(kv_policy="streaming"),
    ):
        pass


# past the context length


@both
@either
def test_a_stream_runs_past_the_context_length(stage: Stage, path: str, stream: bool) -> None:
    answer = usage(stage.live, path, stream=stream, kv_policy=STREAMING, max_tokens=600)
    assert answer["completion_tokens"] == 600
    assert answer["kv"]["slots"] < 4 + 28 + 2 * 16


def test_the_number_may_have_either_name_in_a_chat(stage: Stage) -> None:
    assert usage(stage.live, CHAT, kv_policy=STREAMING, max_completion_tokens=600)["completion_tokens"] == 600


@both
def test_without_a_budget_nothing_goes_past_the_context_length(stage: Stage, path: str) -> None:
    for fields in ({}, {"kv_policy": "full"}):
        error = check_error(ask(stage.live, path, max_tokens=600, **fields), 400)
        assert error["code"] == "context_length_exceeded"


def test_who_does_not_say_how_many_tokens_gets_as_many_as_ever(stage: Stage) -> None:
    for path in BODIES:
        counts = [
            usage(stage.live, path, **fields)["total_tokens"]
            for fields in ({"kv_policy": STREAMING}, {"kv_policy": "full"})
        ]
        assert counts[0] == counts[1]
    assert counts == [512, 512], "a chat fills the context"


@pytest.mark.parametrize("prompt", [[1] * 513, [1] * 2000, "a" * 512, ["b", "a" * 512]], ids=lambda one: str(one)[:9])
def test_prompts_stay_within_the_context_length(stage: Stage, prompt: Any) -> None:
    for fields in ({}, {"max_tokens": 5}):
        error = check_error(ask(stage.live, prompt=prompt, kv_policy=STREAMING, **fields), 400)
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


def test_a_prompt_that_fills_the_context_can_be_continued_on_demand(stage: Stage) -> None:
    prompt = [1] * 512
    check_error(ask(stage.live, prompt=prompt, kv_policy=STREAMING), 400)
    assert usage(stage.live, prompt=prompt, kv_policy=STREAMING, max_tokens=5)["total_tokens"] == 517
    nothing = ask(stage.live, prompt=prompt, kv_policy=STREAMING, max_tokens=0, echo=True).json()
    assert nothing["usage"]["kv"] == {"policy": STREAMING, "evicted_tokens": 0, "slots": 0}


@both
def test_a_stream_has_a_limit_that_counts_all_choices(start: Callable[..., Live], path: str) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, max_stream_tokens=1000))
    fields = {"kv_policy": STREAMING}
    assert ask(live, path, max_tokens=1000, **fields).status_code == 200
    assert ask(live, path, max_tokens=500, n=2, **fields).status_code == 200
    for more in ({"max_tokens": 1001}, {"max_tokens": 501, "n": 2}, {"max_tokens": 401, "n": 2, "best_of": 3}):
        error = check_error(ask(live, path, **fields, **more), 400)
        assert (error["param"], error["code"]) == ("max_tokens", None)
        assert "more than the 1000 that a request which runs past the model's context length" in error["message"]
    assert len(live.engine.submitted) == 2


def test_prompts_count_towards_the_limit_of_a_stream(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, max_stream_tokens=1000))
    assert ask(live, prompt=["a", "b"], max_tokens=500, kv_policy=STREAMING).status_code == 200
    check_error(ask(live, prompt=["a", "b"], max_tokens=501, kv_policy=STREAMING), 400)


def test_the_limit_of_a_stream_is_none_of_what_stays_within_the_context(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, max_stream_tokens=1))
    assert ask(live, max_tokens=200, n=5, kv_policy=STREAMING).status_code == 200
    check_error(ask(live, max_tokens=255, kv_policy=STREAMING), 400)


def test_a_million_tokens_are_the_limit_by_default(live: Live) -> None:
    fields = {"kv_policy": STREAMING, "ignore_eos": False}
    assert ask(live, max_tokens=1_000_000, **fields).status_code == 200
    check_error(ask(live, max_tokens=1_000_001, **fields), 400)


def test_the_largest_number_of_tokens_does_no_harm() -> None:
    def ending(row: SampleRow) -> Sample:
        return Sample(token("A" if row.num_output_tokens < 40 else "Z"))

    with staged(ServerConfig(port=0, max_stream_tokens=2**40), script=ending) as stage:
        answer = ask(stage.live, max_tokens=2**31 - 1, stop="Z", kv_policy=STREAMING).json()
    assert answer["choices"][0]["text"] == "A" * 40


# what it is told


@both
@either
def test_an_ordinary_answers_usage_is_as_ever(stage: Stage, path: str, stream: bool) -> None:
    for fields in ({}, {"kv_policy": "full"}):
        told = usage(stage.live, path, stream=stream, max_tokens=3, **fields)
        assert sorted(told) == ["completion_tokens", "prompt_tokens", "prompt_tokens_details", "total_tokens"]


@either
@pytest.mark.parametrize("n", [1, 3])
def test_usage_says_what_was_evicted_and_what_was_held_at_the_end(stage: Stage, stream: bool, n: int) -> None:
    """Of 3 prompt and 599 computed output tokens the last, at position 601, sees from 574 on: of the 35 blocks before
    that one stays for the sinks."""
    told = usage(stage.live, stream=stream, prompt="a0", n=n, max_tokens=600, kv_policy=STREAMING)
    assert told["kv"] == {"policy": STREAMING, "evicted_tokens": n * 34 * 16, "slots": n * (602 - 34 * 16)}


def test_the_policy_is_told_with_the_fields_that_the_request_left_out(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(config=EngineConfig(kv_policy="streaming")))
    assert usage(live, max_tokens=1)["kv"]["policy"] == {"type": "streaming", "sinks": 4, "window": 1020}
    assert usage(live, max_tokens=1, kv_policy={"type": "window"})["kv"]["policy"] == describe(SlidingWindow())


def test_several_prompts_are_summed_up(stage: Stage) -> None:
    one = usage(stage.live, prompt="a0", max_tokens=100, kv_policy=STREAMING)["kv"]
    two = usage(stage.live, prompt=["a0", "b0"], max_tokens=100, kv_policy=STREAMING)["kv"]
    assert (two["evicted_tokens"], two["slots"]) == (2 * one["evicted_tokens"], 2 * one["slots"])


@pytest.mark.parametrize("fields", [{}, {"use_beam_search": True}], ids=["best_of", "beams"])
def test_continuations_that_lost_are_counted_too(fields: dict[str, Any]) -> None:
    def script(row: SampleRow) -> Sample:
        ways = ((token("A"), -1.0), (token("B"), -1.1), (token("C"), -1.2))
        return Sample(token("A"), candidates=ways)

    with staged(script=script, max_num_seqs=4, block_size=4) as stage:
        window = {"type": "window", "window": 8}
        told = usage(stage.live, prompt="a0", best_of=3, max_tokens=30, kv_policy=window, **fields)
    # 32 tokens were computed, of which the last, at position 31, sees from 24 on.
    assert told["kv"] == {"policy": window, "evicted_tokens": 3 * 24, "slots": 3 * 8}


# what Prometheus is told


def page(stage: Stage, name: str) -> dict[str, float]:
    """A metric's values by policy."""
    found = samples(stage.live.http.get("/metrics").content)
    return {dict(labels)["policy"]: value for (own, labels), value in found.items() if own == f"octavo:{name}"}


def test_evicted_tokens_are_counted_by_policy(stage: Stage) -> None:
    before = page(stage, "kv_tokens_evicted_total")
    assert before.keys() == POLICIES.keys()
    given = {"streaming": STREAMING, "window": {"type": "window", "window": 100}, "full": "full"}
    evicted = {
        name: usage(stage.live, max_tokens=300, kv_policy=policy).get("kv", {"evicted_tokens": 0})["evicted_tokens"]
        for name, policy in given.items()
    }
    after = page(stage, "kv_tokens_evicted_total")
    assert {name: after[name] - before[name] for name in evicted} == evicted
    assert evicted["streaming"] > evicted["window"] > 0


def test_slots_that_sequences_hold_show_by_policy() -> None:
    """Read while the step after the first request's 41st token waits. 43 of its tokens are computed, and the next sees
    from 36 on. The others began a step later: 42 tokens, of which the third request needs those from 35 on, in blocks
    of 4; and of the second's two continuations the first has ended: only that request has a stop string."""
    with staged(max_num_seqs=4, block_size=4) as stage:

        def script(row: SampleRow) -> Sample:
            if row.num_output_tokens == 40:
                stage.model.gate.clear()
            ends = row.seed % 2**32 == 0 and row.num_output_tokens == 5
            return Sample(token("Z" if ends else "A"))

        stage.model.script = script
        window = {"type": "window", "window": 8}
        with stage.held():
            answers = [
                stage.send(prompt="a0", max_tokens=50, kv_policy=window),
                stage.send(prompt="b0", max_tokens=50, n=2, stop="Z"),
                stage.send(prompt="c0", max_tokens=50, kv_policy=window),
            ]
        expected = {**dict.fromkeys(POLICIES, 0.0), "window": 43.0 - 36 + 42 - 32, "full": 42.0}
        assert wait_until(lambda: page(stage, "kv_policy_slots") == expected), page(stage, "kv_policy_slots")
        stage.model.script = only_a
        stage.model.gate.set()
        assert [answer.result().status_code for answer in answers] == [200, 200, 200]
        assert stage.drained()
        assert page(stage, "kv_policy_slots") == dict.fromkeys(POLICIES, 0.0)


# with a real model


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server around a tiny random model that was made for 64 tokens."""
    model = random_model("llama", num_hidden_layers=2, max_position_embeddings=64)
    config = EngineConfig(model=str(save(model, tmp_path_factory.mktemp("tiny"))), dtype="float32", block_size=4)
    server = ServerConfig(port=0, served_model_name=("tiny",))
    with running(assemble(config, load_model(config)), server) as live:
        yield live


SMALL = {"type": "streaming", "sinks": 3, "window": 13}


def test_a_real_model_goes_on_past_what_it_was_made_for(real: Live) -> None:
    """Of 202 computed tokens the last, at position 201, sees from 189 on, in blocks of 4; one is the sinks'."""
    whole = ask(real, prompt=[5, 6, 7], max_tokens=200, temperature=0, kv_policy=SMALL).json()
    assert whole["usage"]["completion_tokens"] == 200
    assert whole["usage"]["kv"] == {"policy": SMALL, "evicted_tokens": 46 * 4, "slots": 202 - 46 * 4}
    short = ask(real, prompt=[5, 6, 7], max_tokens=60, temperature=0, kv_policy=SMALL).json()
    assert whole["choices"][0]["text"].startswith(short["choices"][0]["text"])
    assert len(set(whole["choices"][0]["text"])) > 10


def test_a_neighbour_of_an_endless_stream_gets_the_answer_it_gets_alone(real: Live) -> None:
    def neighbour() -> Any:
        return ask(real, prompt="The neighbour", max_tokens=40, temperature=0, logprobs=2).json()["choices"][0]

    alone = neighbour()
    endless = {"kv_policy": SMALL, "ignore_eos": True}
    stream = real.openai.completions.create(
        model="tiny", prompt="you", max_tokens=500_000, temperature=0, stream=True, extra_body=endless
    )
    with stream:
        assert len(list(itertools.islice(stream, 100))) == 100, "it is past the context"
        beside = neighbour()
        assert next(stream).choices[0].finish_reason is None, "it ran all the while"
    assert beside["text"] == alone["text"]
    assert beside["logprobs"]["tokens"] == alone["logprobs"]["tokens"]
    assert beside["logprobs"]["token_logprobs"] == pytest.approx(alone["logprobs"]["token_logprobs"], abs=1e-4)
    assert wait_until(lambda: real.engine.stats().used_blocks == 0), "the client has left"
