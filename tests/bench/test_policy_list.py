import dataclasses

import pytest

from bench.policy_list import Candidate, candidates, check
from engine.engine_info import EngineInfo
from engine.errors import ConfigError
from engine.kv_policies.full import Full
from engine.kv_policies.h2o import H2O
from engine.kv_policies.streaming import Streaming
from engine.kv_policies.window import SlidingWindow

INFO = EngineInfo(
    model_name="tiny",
    architecture="llama",
    dtype="float32",
    device="cpu",
    threads=1,
    vocab_size=320,
    hidden_size=8,
    max_model_len=256,
    weight_bytes=1,
    num_blocks=16,
    block_size=16,
    kv_bytes=1,
    load_seconds=0.0,
)


def test_a_name_stands_for_the_policy_and_its_defaults() -> None:
    (full, streaming) = candidates(["full", "streaming"], [64])
    assert full == Candidate(Full(), "full", None)
    assert streaming == Candidate(Streaming(), "streaming", 1024)


def test_fields_are_given_behind_the_name_or_as_the_servers_json() -> None:
    (short,) = candidates(["streaming:sinks=2,window=30"], [])
    (json,) = candidates(['{"type": "streaming", "sinks": 2, "window": 30}'], [])
    assert short.policy == json.policy == Streaming(sinks=2, window=30)
    assert short.budget == json.budget == 32
    assert short.label == "streaming sinks=2 window=30"


def test_a_star_is_each_of_the_budgets() -> None:
    given = ["window:window=*", "h2o:heavy=*/4,recent=*-10", '{"type": "window", "window": "*-4"}']
    found = candidates(given, [40, 80])
    assert [one.policy for one in found] == [
        SlidingWindow(window=40),
        SlidingWindow(window=80),
        H2O(heavy=10, recent=30),
        H2O(heavy=20, recent=70),
        SlidingWindow(window=36),
        SlidingWindow(window=76),
    ]
    assert [one.budget for one in found] == [40, 80] * 3
    assert len({one.given for one in found}) == 3


def test_what_a_selecting_policy_keeps_is_its_slots() -> None:
    (h2o,) = candidates(["h2o:heavy=10,recent=20,slack=16"], [])
    assert h2o.budget == 30


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("h3o", "there is no policy 'h3o'"),
        ("", "there is no policy ''"),
        ("window:", "expected NAME:FIELD=VALUE"),
        ("window:window", "expected NAME:FIELD=VALUE"),
        ("window:window=", "expected NAME:FIELD=VALUE"),
        ("window:window=4,window=5", "each field once"),
        ("window:window=four", "window must be a whole number"),
        ("window:window=**", "window must be a whole number"),
        ("window:window=-4", "window must be a whole number"),
        ("window:window=4.5", "window must be a whole number"),
        ("window:sinks=4", "has only 'window', not 'sinks'"),
        ("streaming:window=*-100", "with a budget of 40: window must be a whole number"),
        ("{", "is not JSON"),
        ('{"window": 4}', "must be a policy's name"),
    ],
)
def test_a_policy_that_makes_no_sense_is_one_line_that_names_it(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        candidates([given], [40])
    assert str(caught.value).startswith(f"--policy {given}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_policy_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="two of 'window window=40'"):
        candidates(["window:window=*", "window:window=40"], [40])


def test_a_policy_that_the_engine_would_refuse_is_refused() -> None:
    policies = candidates(["full", "streaming:sinks=4,window=252"], [])
    check(policies, INFO)
    with pytest.raises(ConfigError, match=r"^--policy streaming:sinks=4,window=252: the KV policy keeps 256 tokens"):
        check(policies, dataclasses.replace(INFO, max_model_len=255))
    with pytest.raises(ConfigError, match=r"^--policy streaming:sinks=4,window=252: .*dynamic NTK"):
        check(policies, dataclasses.replace(INFO, position_dependent_rotation=True))
