"""The best of several continuations, sampled or found by beam search, as the official client gets them."""

from collections.abc import Iterator
from typing import Any

import pytest

from engine.memory import MemoryPlan
from engine.outputs import TokenLogprob
from engine.sampler import Sample, SampleRow
from tests.server.conftest import Live, wait_until
from tests.server.refusals import check_error
from tests.server.scripted import Stage, staged, token
from tests.server.test_disconnects import connect
from tests.server.test_metrics import samples

EOS = 257
LIVES = [(6, -0.5), (2, -1.0), (4, -0.25), (1, -0.6)]
"""Of continuations 0 to 3: their tokens, EOS included, and the log-probability of each. By token 2 is best, then 0;
as a whole it would be 3, then 1."""
TREE = {
    "": {"x": -0.5, "y": -1.0},
    "x": {"p": -2.0, "q": -2.5},
    "y": {"r": -0.1, "s": -3.0},
}
"""What may follow; then comes EOS. The greedy way is xp, the best way yr, the second best xp."""
KINDS = {"best_of": {"best_of": 4}, "beams": {"best_of": 4, "use_beam_search": True}}
MESSAGES = [{"role": "user", "content": "Hi"}]


def script(row: SampleRow) -> Sample:
    """For a beam the tree's, for others the next token of a life: its number, and EOS at its end."""
    if row.num_candidates:
        output = "".join(chr(one + ord("!")) for one in row.tokens[row.num_prompt_tokens :])
        ways = {token(letter): logprob for letter, logprob in TREE.get(output, {}).items()} or {EOS: -0.01}
        if row.params.ignore_eos:
            ways = {token("A"): -1.0, token("B"): -1.1, token("C"): -1.2, token("D"): -1.3}
        return Sample(0, candidates=tuple(ways.items()))
    number = row.seed % 2**32
    length, logprob = LIVES[number]
    last = row.num_output_tokens + 1 >= length and not row.params.ignore_eos
    chosen = EOS if last else token(str(number))
    top = ((chosen, logprob), (token("z"), -5.0))[: row.params.logprobs or 0]
    return Sample(chosen, TokenLogprob(chosen, logprob, top))


@pytest.fixture(scope="module")
def shared_stage() -> Iterator[Stage]:
    with staged(script=script, max_num_seqs=4) as stage:
        yield stage


@pytest.fixture
def stage(shared_stage: Stage) -> Iterator[Stage]:
    """A server with places for four; afterwards it must be idle."""
    shared_stage.model.pace = 0.0
    yield shared_stage
    assert shared_stage.drained()


def complete(stage: Stage, **arguments: Any) -> Any:
    return stage.live.openai.completions.create(**{"model": "fake", "prompt": "p", **arguments})


def chat(stage: Stage, **body: Any) -> Any:
    return stage.live.openai.chat.completions.create(model="fake", messages=MESSAGES, extra_body=body)  # type: ignore[arg-type]


def search(stage: Stage, **arguments: Any) -> Any:
    options = {name: arguments.pop(name) for name in ("length_penalty", "early_stopping") if name in arguments}
    return complete(stage, **arguments, extra_body={"use_beam_search": True, **options})


def texts(answer: Any) -> list[str]:
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    return [choice.text if hasattr(choice, "text") else choice.message.content for choice in answer.choices]


# sampled


def test_the_likeliest_by_token_win_and_the_best_is_first(stage: Stage) -> None:
    answer = complete(stage, n=2, best_of=4)
    assert texts(answer) == ["222", "00000"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert texts(complete(stage, best_of=4)) == ["222"]
    assert texts(complete(stage, n=3, best_of=4)) == ["222", "00000", ""]


def test_as_many_as_are_made_come_as_they_are_made(stage: Stage) -> None:
    assert texts(complete(stage, n=4, best_of=4)) == texts(complete(stage, n=4)) == ["00000", "1", "222", ""]


def test_a_choices_index_is_prompt_times_n_plus_rank(stage: Stage) -> None:
    assert texts(complete(stage, prompt=["p", "q"], n=2, best_of=4, echo=True)) == ["p222", "p00000", "q222", "q00000"]


def test_usage_counts_what_was_generated_for_all(stage: Stage) -> None:
    usage = complete(stage, prompt=["p", "q"], n=1, best_of=4).usage
    assert usage.completion_tokens == 2 * sum(length for length, _ in LIVES)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("count", [None, 0, 1])
def test_logprobs_are_shown_as_far_as_they_were_asked_for(stage: Stage, count: int | None) -> None:
    logprobs = complete(stage, best_of=4, logprobs=count).choices[0].logprobs
    if count is None:
        assert logprobs is None
        return
    assert logprobs.tokens == ["2", "2", "2", "</s>"]
    assert logprobs.token_logprobs == [-0.25] * 4
    assert logprobs.top_logprobs[0] == {"2": -0.25}


def test_a_chat_takes_it_too(stage: Stage) -> None:
    assert texts(chat(stage, n=2, best_of=4)) == ["222", "00000"]


# beams


def test_beams_find_what_is_likelier_than_the_greedy_way(stage: Stage) -> None:
    answer = search(stage, n=2)
    assert texts(answer) == ["yr", "xp"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert answer.usage.completion_tokens == 6
    assert texts(search(stage, n=1)) == ["xp"], "one beam is greedy"


def test_best_of_is_the_width_and_n_how_many_are_shown(stage: Stage) -> None:
    answer = search(stage, n=1, best_of=3)
    assert texts(answer) == ["yr"]
    assert answer.usage.completion_tokens == 9, "of all that were found"
    assert texts(search(stage, prompt=["p", "q"], n=2, best_of=3)) == ["yr", "xp"] * 2


def test_a_chat_searches_too(stage: Stage) -> None:
    answer = chat(stage, n=2, use_beam_search=True, logprobs=True, top_logprobs=2)
    assert texts(answer) == ["yr", "xp"]
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.logprob) == ("y", -1.0)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("x", -0.5), ("y", -1.0)]


def test_the_options_of_a_search_reach_it(stage: Stage) -> None:
    seen = []

    def spy(row: SampleRow) -> Sample:
        seen.append(row.params)
        return script(row)

    stage.model.script = spy
    search(stage, n=2, length_penalty=-0.5, early_stopping="never")
    search(stage, n=2)
    stage.model.script = script
    found = {(one.width, one.beams.length_penalty, one.beams.early_stopping) for one in seen}
    assert found == {(2, -0.5, "never"), (2, 1.0, False)}


def test_a_search_takes_a_seed_and_values_that_ask_for_nothing(stage: Stage) -> None:
    neutral = {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "logit_bias": {}}
    body = {"prompt": "p", "n": 2, "use_beam_search": True, "stop": [], "seed": 7, **neutral}
    answer = stage.post(**{**body, "ignore_eos": False, "max_tokens": 9}).json()
    assert [choice["text"] for choice in answer["choices"]] == ["yr", "xp"]


def test_what_a_checkpoint_recommends_is_for_sampling(live: Live) -> None:
    live.engine.default_sampling = {"temperature": 0.6, "repetition_penalty": 1.1}
    assert live.http.post("/v1/completions", json={"prompt": "x", "use_beam_search": True}).status_code == 200
    params = live.engine.submitted[-1].params
    assert (params.greedy, params.repetition_penalty) == (True, 1.0)


# both


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompts_blocks_are_shared(stage: Stage, kind: str) -> None:
    answer = stage.post(prompt="p" * 40, max_tokens=3, **KINDS[kind])  # and <s>: two full blocks and nine tokens
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    tables = [item.block_table for item in stage.model.last]
    assert len(tables) == 4
    assert len({table[:2].tobytes() for table in tables}) == 1
    assert len({table[2] for table in tables}) == 4, "the last one is written to"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_frees_everything_at_once(stage: Stage, kind: str, path: str) -> None:
    stage.model.pace = 0.002
    body = {"prompt": "p", "messages": MESSAGES, "max_tokens": 400, "ignore_eos": True, **KINDS[kind]}
    with connect(stage.live, body, path):
        assert wait_until(lambda: stage.live.engine.stats().num_running == 4)
    assert wait_until(lambda: stage.is_idle, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deadline_ends_all_of_it(stage: Stage, kind: str) -> None:
    stage.model.pace = 0.002
    answer = stage.post(prompt=["p", "q"], max_tokens=400, timeout=0.1, **KINDS[kind])
    assert check_error(answer, answer.status_code)["code"] in ("request_timeout", "queue_timeout")
    assert wait_until(lambda: stage.is_idle, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_run_at_a_time_is_a_400_that_names_the_field(stage: Stage, kind: str) -> None:
    error = check_error(stage.post(prompt="p", **{**KINDS[kind], "best_of": 5}), 400)
    assert (error["param"], error["message"]) == ("best_of", "5 sequences are more than the 4 that run at a time")


def test_what_can_never_fit_is_a_400_in_tokens() -> None:
    with staged(plan=MemoryPlan(num_blocks=4, num_host_blocks=0, max_model_len=512), max_num_seqs=4) as stage:
        for kind in ({"n": 2}, *KINDS.values()):
            error = check_error(stage.post(prompt="p" * 39, max_tokens=25, **kind), 400)
            assert error["param"] == "max_tokens"
            assert error["message"] == "the request may need 65 tokens of KV cache, but the cache holds 64 in all"


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_count_what_usage_counts(kind: str) -> None:
    with staged(script=script, max_num_seqs=4) as stage:
        usage = stage.post(prompt="p", max_tokens=5, **KINDS[kind]).json()["usage"]
        page = samples(stage.live.http.get("/metrics").content)
        assert page["octavo:generation_tokens_total", frozenset()] == usage["completion_tokens"] == 20
        assert page["octavo:prompt_tokens_total", frozenset()] == usage["prompt_tokens"]
