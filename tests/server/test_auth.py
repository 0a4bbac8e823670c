"""The key that every route but the probes asks for."""

from collections.abc import Iterable, Iterator

import openai
import pytest

from server.auth import OPEN_PATHS
from server.config import ServerConfig
from tests.server.conftest import Live, running
from tests.server.fakes import FakeEngine


@pytest.fixture(scope="module")
def locked() -> Iterator[Live]:
    with running(FakeEngine(), ServerConfig(port=0, api_key="first, second"), key="first") as live:
        yield live


def walk(routes: Iterable[object]) -> Iterator[tuple[str, str]]:
    """(method, path) of all routes, those of included routers too."""
    for route in routes:
        if hasattr(route, "original_router"):
            yield from walk(route.original_router.routes)
        else:
            for method in route.methods:
                yield method, route.path


def test_every_route_but_the_probes_needs_the_key(locked: Live) -> None:
    routes = set(walk(locked.app.routes))
    assert {path for _, path in routes} >= {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/models",
        "/metrics",
        "/version",
        "/tokenize",
        "/docs",
        "/openapi.json",
        *OPEN_PATHS,
    }
    for method, path in routes:
        status = locked.http.request(method, path).status_code
        assert status == (200 if path in OPEN_PATHS else 401), (method, path)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer firs",
        "Bearer firstt",
        "Bearer first second",
        "Basic first",
        "first",
        "Bearer \xff\xfe",
    ],
)
def test_a_wrong_key_is_a_401_in_openais_shape(locked: Live, header: str) -> None:
    answer = locked.http.get("/v1/models", headers={"authorization": header.encode("latin-1")})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health/", "//health", "/health/x", "/HEALTH", "/ready?x"])
def test_only_the_exact_paths_are_open(locked: Live, path: str) -> None:
    expected = 200 if path == "/ready?x" else 401
    assert locked.http.get(path).status_code == expected


def test_an_unknown_url_does_not_tell_itself_apart_without_a_key(locked: Live) -> None:
    assert locked.http.get("/nothing").status_code == 401


@pytest.mark.parametrize("header", ["Bearer first", "bearer second", "Bearer  first"])
def test_each_of_several_keys_is_good(locked: Live, header: str) -> None:
    assert locked.http.get("/v1/models", headers={"authorization": header}).status_code == 200


def test_two_authorization_headers_are_none(locked: Live) -> None:
    headers = [("authorization", "Bearer first"), ("authorization", "Bearer first")]
    assert locked.http.get("/v1/models", headers=headers).status_code == 401


def test_the_official_client_sends_the_key(locked: Live) -> None:
    assert [model.id for model in locked.openai.models.list()] == ["fake"]
    with pytest.raises(openai.AuthenticationError):
        locked.openai.with_options(api_key="wrong").models.list()


def test_keys_are_shown_nowhere() -> None:
    assert "secret" not in repr(ServerConfig(api_key="secret"))
