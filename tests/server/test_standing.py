"""Who is served first: priorities, and tenants by key or by name."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.config import ServerConfig
from server.protocol import CompletionRequest
from server.standing import Tenants, standing_of
from tests.server.conftest import Live
from tests.server.fakes import FakeEngine
from tests.server.refusals import check_error
from tests.server.scripted import staged

PATHS = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {"input": "x"},
    "/v1/embeddings": {"input": "x"},
}
FOR_EVER = 86400.0
"""An ageing that plays no part in a test."""


def body(path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    return {**PATHS[path], "max_tokens": 1, **fields}


def bearing(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module", params=["priority", "fair"])
def ordered(request: pytest.FixtureRequest) -> Iterator[Any]:
    with staged(scheduling=request.param, ageing=FOR_EVER) as stage:
        yield stage


# priorities


@pytest.mark.parametrize("path", PATHS)
def test_a_priority_is_passed_on(start: Callable[..., Live], path: str) -> None:
    live = start(FakeEngine(config=EngineConfig(scheduling="priority")))
    for priority in (5, -(2**31), 2**31 - 1, 0, None):
        assert live.http.post(path, json=body(path, priority=priority)).status_code == 200
    assert [one.order["priority"] for one in live.engine.submitted] == [5, -(2**31), 2**31 - 1, 0, 0]


@pytest.mark.parametrize("path", PATHS)
def test_without_an_order_that_knows_it_a_priority_is_a_400_that_says_what_to_do(live: Live, path: str) -> None:
    error = check_error(live.http.post(path, json=body(path, priority=1)), 400)
    assert error["param"] == "priority"
    assert "--scheduling priority" in error["message"]
    for nothing in (0, None):
        assert live.http.post(path, json=body(path, priority=nothing)).status_code == 200


def test_the_lowest_priority_is_served_first(ordered: Any) -> None:
    ordered.model.begun.clear()
    with ordered.held():
        for prompt, priority in {"a0": 0, "b7": 7, "c0": 0, "d-": -7, "e0": None}.items():
            ordered.send(prompt=prompt, priority=priority)
    assert ordered.drained()
    assert ordered.model.begun == ["a0", "d-", "c0", "e0", "b7"]


# tenants


def test_a_tenant_that_floods_is_overtaken_by_one_that_does_not() -> None:
    with staged(scheduling="fair", ageing=FOR_EVER) as stage:
        with stage.held():
            stage.send(prompt=[f"a{i}" for i in range(6)], user="a")
            stage.send(prompt=["b0", "b1"], user="b")
        assert stage.drained()
        assert stage.model.begun == ["a0", "b0", "a1", "b1", "a2", "a3", "a4", "a5"]


def test_with_several_keys_each_is_a_tenant() -> None:
    config = ServerConfig(port=0, api_key="one,two")
    with staged(config, key="one", scheduling="fair", ageing=FOR_EVER) as stage:
        with stage.held():
            stage.send(prompt=["a0", "a1", "a2"], headers=bearing("one"))
            stage.send(prompt=["b0"], headers=bearing("one"), user="another name does not help")
            stage.send(prompt=["c0"], headers=bearing("two"))
        assert stage.drained()
        assert stage.model.begun == ["a0", "c0", "a1", "a2", "b0"]


def test_first_come_first_served_knows_no_tenants() -> None:
    with staged() as stage:
        with stage.held():
            stage.send(prompt=["a0", "a1", "a2"], user="a")
            stage.send(prompt="b0", user="b")
        assert stage.drained()
        assert stage.model.begun == ["a0", "a1", "a2", "b0"]


def tenant(tenants: Tenants, key: str | None = None, user: str | None = None) -> str:
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    return tenants.name({"type": "http", "headers": headers}, user)


@pytest.mark.parametrize(
    ("config", "by_key"),
    [
        ({}, False),
        ({"api_key": "one"}, False),
        ({"api_key": "one,one"}, False),
        ({"api_key": "one,two"}, True),
        ({"api_key": "one,two", "tenant": "user"}, False),
        ({"tenant": "api-key"}, True),
    ],
    ids=str,
)
def test_a_tenant_is_who_has_the_key_or_the_name(config: dict[str, Any], by_key: bool) -> None:
    tenants = Tenants(ServerConfig(**config))
    assert (tenant(tenants, "one", "a") != tenant(tenants, "two", "a")) == by_key
    assert (tenant(tenants, "one", "a") != tenant(tenants, "one", "b")) == (not by_key)
    assert tenant(tenants, "one", "a") == tenant(tenants, "one", "a")


def test_who_shows_nothing_is_one_tenant() -> None:
    assert tenant(Tenants(ServerConfig()), "one") == tenant(Tenants(ServerConfig()), user="") == ""
    assert tenant(Tenants(ServerConfig(tenant="api-key")), user="a") == ""


def test_keys_and_users_are_never_the_same_tenant_nor_to_be_read_in_its_name() -> None:
    by_key, by_user = Tenants(ServerConfig(tenant="api-key")), Tenants(ServerConfig(tenant="user"))
    by_user._secret = by_key._secret
    names = {tenant(by_key, "secret"), tenant(by_user, user="secret"), tenant(Tenants(ServerConfig()), user="secret")}
    assert len(names) == 3
    assert all("secret" not in name and len(name) == 32 for name in names)


@pytest.mark.parametrize("path", PATHS)
def test_the_tenant_reaches_the_engine_and_the_key_does_not(start: Callable[..., Live], path: str) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, api_key="one,two"))
    for key in ("one", "two", "one"):
        assert live.http.post(path, json=body(path, user="me"), headers=bearing(key)).status_code == 200
    first, second, third = (one.order["tenant"] for one in live.engine.submitted)
    assert first == third != second
    assert "one" not in first


def test_a_user_may_have_a_long_name(live: Live) -> None:
    assert live.http.post("/v1/completions", json=body(user="ü" * 1024)).status_code == 200


def test_the_setting_knows_three_words() -> None:
    with pytest.raises(ConfigError, match="auto, api-key, user"):
        ServerConfig(tenant="ip")


# time


def test_a_request_without_a_timeout_has_no_deadline() -> None:
    assert standing_of(CompletionRequest(prompt="x"), "", scheduling="fcfs", arrival=0.0).timeout is None


def test_a_timeout_counts_from_the_arrival() -> None:
    request = CompletionRequest(prompt="x", timeout=5.0)
    arrival = time.monotonic() - 3
    assert standing_of(request, "", scheduling="fcfs", arrival=arrival).timeout == pytest.approx(2, abs=0.5)
    assert standing_of(request, "", scheduling="fcfs", arrival=arrival - 3).timeout == 0
