"""Which pages may use the server from a browser."""

from collections.abc import Callable

import httpx
import pytest

from engine.errors import ConfigError
from server.config import ServerConfig
from tests.server.conftest import Live
from tests.server.fakes import FakeEngine

PAGE = "https://chat.example.com"
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}]}


def ask_first(live: Live, origin: str) -> httpx.Response:
    """What a browser sends before a page's request."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return live.http.options(CHAT, headers={"Origin": origin, **asked})


def test_no_page_may_by_default(live: Live) -> None:
    assert ask_first(live, PAGE).status_code == 405
    answer = live.http.post(CHAT, json=BODY, headers={"Origin": PAGE})
    assert "access-control-allow-origin" not in answer.headers


def test_pages_of_the_named_origins_may(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, cors_origins=(PAGE, "http://localhost:3000"), api_key=("k",)), "k")
    first = ask_first(live, PAGE)
    assert first.status_code == 200, "without the key: a browser never shows it here"
    assert first.headers["access-control-allow-origin"] == PAGE
    assert first.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "x-request-id" in first.headers
    for stream in (False, True):
        answer = live.http.post(
            CHAT, json={**BODY, "stream": stream}, headers={"Origin": PAGE, "Authorization": "Bearer k"}
        )
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    refused = live.http.post(CHAT, json=BODY, headers={"Origin": PAGE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)


def test_pages_of_other_origins_may_not(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, cors_origins=(PAGE,)))
    assert ask_first(live, "https://elsewhere.example.com").status_code == 400
    answer = live.http.post(CHAT, json=BODY, headers={"Origin": f"{PAGE}.elsewhere.com"})
    assert "access-control-allow-origin" not in answer.headers


def test_all_pages_may_by_a_star(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, cors_origins=("*",)))
    assert ask_first(live, "null").headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["localhost:3000", "https://example.com/", "https://*.example.com"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="--cors-origins"):
        ServerConfig(cors_origins=(origin,))
