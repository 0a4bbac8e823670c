"""POST /v1/embeddings, as the official client sees it."""

import base64
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.errors import NumericalError
from server.config import ServerConfig
from server.embeddings import written
from tests.server.conftest import Live, wait_until
from tests.server.fakes import HIDDEN_SIZE, FakeEngine, embedding_of
from tests.server.refusals import check_error
from tests.server.scripted import staged
from tests.server.test_disconnects import connect
from tests.server.test_metrics import samples

PATH = "/v1/embeddings"


def numbers(answer: Any) -> list[Any]:
    return [np.array(one["embedding"], dtype=np.float32) for one in answer.json()["data"]]


def unit(vector: Any) -> Any:
    return vector / np.linalg.norm(vector)


def test_the_official_client_gets_a_unit_vector_for_each_input(live: Live) -> None:
    answer = live.openai.embeddings.create(model="fake", input=["a", "bc", "a"], user="me")
    assert (answer.object, answer.model) == ("list", "fake")
    assert [one.object for one in answer.data] == ["embedding"] * 3
    assert [one.index for one in answer.data] == [0, 1, 2]
    assert answer.usage.model_dump(include={"prompt_tokens", "total_tokens"}) == {"prompt_tokens": 7, "total_tokens": 7}
    for one, text in zip(answer.data, ["a", "bc", "a"], strict=True):
        expected = embedding_of(live.engine.tokenizer.encode(text), "mean")
        np.testing.assert_allclose(one.embedding, unit(expected), rtol=1e-6)
    assert answer.data[0].embedding == answer.data[2].embedding != answer.data[1].embedding
    assert not live.engine.open


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("ab", [[256, 64, 65]]),
        (["a", "b"], [[256, 64], [256, 65]]),
        ([64, 65], [[64, 65]]),
        ([[64], [65, 66]], [[64], [65, 66]]),
    ],
)
def test_an_input_has_one_of_four_forms(live: Live, given: Any, prompts: list[list[int]]) -> None:
    answer = live.openai.embeddings.create(model="fake", input=given, encoding_format="float")
    assert [one.prompt for one in live.engine.submitted[-len(prompts) :]] == prompts
    expected = [unit(embedding_of(prompt, "mean")) for prompt in prompts]
    np.testing.assert_allclose([one.embedding for one in answer.data], expected, rtol=1e-6)


def test_both_encodings_say_the_same_float32s(live: Live) -> None:
    body = {"input": ["a", "b"]}
    floats = live.http.post(PATH, json={**body, "encoding_format": "float"})
    encoded = live.http.post(PATH, json={**body, "encoding_format": "base64"})
    for vector, one in zip(numbers(floats), encoded.json()["data"], strict=True):
        assert np.frombuffer(base64.b64decode(one["embedding"]), "<f4").tolist() == vector.tolist()


@pytest.mark.parametrize("values", [[1e-30, 3.4e38, -0.0, 1 / 3], [0.0] * 4, [1e-45, 0, 0, 0]])
@pytest.mark.parametrize("normalize", [True, False])
def test_every_float32_is_read_back_as_it_was(values: list[float], normalize: bool) -> None:
    vector = np.array(values, dtype=np.float32)
    floats = np.array(json.loads(written(vector, normalize=normalize, encoding="float")), dtype=np.float32)
    encoded = json.loads(written(vector, normalize=normalize, encoding="base64"))
    assert np.frombuffer(base64.b64decode(encoded), "<f4").tolist() == floats.tolist()
    if not normalize or not any(values):
        assert floats.tolist() == vector.tolist()
    else:
        assert np.linalg.norm(floats.astype(np.float64)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooling_and_length_are_as_asked_for(live: Live, pooling: str) -> None:
    body = {"input": [64, 65], "pooling": pooling, "normalize": False, "dimensions": HIDDEN_SIZE}
    (vector,) = numbers(live.http.post(PATH, json=body))
    np.testing.assert_array_equal(vector, embedding_of([64, 65], pooling))
    params = live.engine.submitted[-1].params
    assert (params.pooling, params.max_tokens) == (pooling, 0)


def test_many_large_vectors_are_whole(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, max_queue=2048))
    answer = live.http.post(PATH, json={"input": [[number % 200] for number in range(2048)]})
    assert [one["index"] for one in answer.json()["data"]] == [*range(2048)]
    np.testing.assert_allclose(numbers(answer)[201], unit(embedding_of([1], "mean")), rtol=1e-6)


def test_salt_time_and_tenant_are_passed_on(live: Live) -> None:
    live.http.post(PATH, json={"input": ["a", "b"], "timeout": 30, "user": "me", "cache_salt": "s"})
    for one in live.engine.submitted[-2:]:
        assert 29 < one.order["timeout"] < 30
        assert one.order["tenant"]
        assert one.salt == "s"


def test_without_numbers_it_is_a_500(live: Live) -> None:
    live.engine.fail_after, failure = 0, live.engine.failure
    live.engine.failure = NumericalError("the model's output is not a number")
    error = check_error(live.http.post(PATH, json={"input": ["a", "b"]}), 500)
    live.engine.failure = failure
    assert error["code"] == "numerical_error"
    assert wait_until(lambda: not live.engine.open, 0.5)


@pytest.mark.parametrize("given", ["one", ["one", "two"]])
def test_a_client_that_leaves_ends_its_request_at_once(live: Live, given: Any) -> None:
    live.engine.pace = 30
    with connect(live, {"input": given}, PATH):
        assert wait_until(lambda: bool(live.engine.open))
    assert wait_until(lambda: not live.engine.open, 0.5)


def test_a_log_line_tells_of_it_without_its_text(start: Callable[..., Live], caplog: pytest.LogCaptureFixture) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, log_requests=True))
    with caplog.at_level(logging.INFO, "octavo.requests"):
        live.http.post(PATH, json={"input": "secret"})
        assert wait_until(lambda: bool(caplog.records))
    (fields,) = [record.fields for record in caplog.records]  # type: ignore[attr-defined]
    assert fields["endpoint"] == f"POST {PATH}"
    assert (fields["prompt_tokens"], fields["generated_tokens"], fields["status"]) == (7, 0, 200)
    assert fields["response_id"].startswith("embd-")
    assert "secret" not in str(fields)


# With the real engine


def test_embeddings_are_served_among_other_requests_and_counted() -> None:
    with staged(max_num_seqs=2, max_num_batched_tokens=16) as stage:
        with stage.held():
            texts = [stage.send(prompt=f"t{i}", max_tokens=9) for i in range(2)]
            vectors = stage.pool.submit(stage.live.http.post, PATH, json={"input": ["a" * 40, "b"], "pooling": "last"})
            assert stage.filled(4)
        assert all(one.result().json()["usage"]["completion_tokens"] == 9 for one in texts)
        answer = vectors.result()
        np.testing.assert_allclose(numbers(answer), [[0.5**0.5] * 2] * 2, rtol=1e-6)
        assert answer.json()["usage"]["prompt_tokens"] == 43
        page = samples(stage.live.http.get("/metrics").content)
        assert page["octavo:request_success_total", frozenset({("finished_reason", "length")})] == 4
        assert page["octavo:generation_tokens_total", frozenset()] == 18


def test_an_embedding_that_takes_too_long_is_a_408_or_a_503_while_it_waits() -> None:
    with staged() as stage:
        with stage.held():
            first = stage.pool.submit(stage.live.http.post, PATH, json={"input": ["a", "b"], "timeout": 0.05})
            assert stage.filled(2)
            second = stage.pool.submit(stage.live.http.post, PATH, json={"input": "c", "timeout": 0.05})
            assert stage.filled(3)
            assert not wait_until(lambda: first.done() or second.done(), 0.1)
        assert {first.result().json()["error"]["code"], check_error(second.result(), 503)["code"]} <= {
            "request_timeout",
            "queue_timeout",
        }
