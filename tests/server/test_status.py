"""/v1/models, /version, /openapi.json, and names."""

from collections.abc import Callable

from engine.kv_policies.registry import POLICIES, describe
from server.config import ServerConfig
from server.version import version
from tests.server.conftest import Live
from tests.server.fakes import FakeEngine


def test_the_model_is_listed(live: Live) -> None:
    (model,) = live.openai.models.list()
    assert (model.id, model.object) == ("fake", "model")
    assert live.openai.models.retrieve("fake").id == "fake"
    assert live.http.get("/v1/models").json()["data"][0]["max_model_len"] == 256


def test_a_model_can_be_served_under_other_names(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, served_model_name="org/one,two"))
    assert [model.id for model in live.openai.models.list()] == ["org/one", "two"]
    assert live.http.get("/v1/models/org/one").json()["id"] == "org/one"
    assert live.openai.completions.create(model="two", prompt="x").model == "two"
    assert live.http.post("/v1/completions", json={"prompt": "x"}).json()["model"] == "org/one"
    assert live.http.post("/v1/completions", json={"prompt": "x", "model": "fake"}).status_code == 404


def test_the_version_is_told(live: Live) -> None:
    assert live.http.get("/version").json() == {"version": version()}


def test_health_and_readiness(live: Live) -> None:
    assert live.http.get("/health").json() == {"status": "ok"}
    assert live.http.get("/ready").json() == {"status": "ready"}


def test_a_draining_server_is_alive_but_takes_no_more(start: Callable[..., Live]) -> None:
    live = start(FakeEngine())
    live.app.state.serving.lifecycle.draining = True
    assert live.http.get("/health").status_code == 200
    assert live.http.get("/ready").status_code == 503
    assert live.http.post("/v1/completions", json={"prompt": "x"}).status_code == 503


def test_the_api_describes_its_bodies(live: Live) -> None:
    description = live.http.get("/openapi.json").json()
    for path, own in {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}.items():
        body = description["paths"][path]["post"]["requestBody"]
        name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        fields = description["components"]["schemas"][name]["properties"]
        assert {own, "best_of", "use_beam_search", "length_penalty"} < fields.keys()
        assert fields["early_stopping"]["enum"] == [True, False, "never", None]
        name, *objects, null = fields["kv_policy"]["anyOf"]
        assert name == {"type": "string", "enum": list(POLICIES)}
        assert null == {"type": "null"}
        for policy, described in zip(POLICIES.values(), objects, strict=True):
            assert described["required"] == ["type"]
            given = {one: field.get("default", field.get("const")) for one, field in described["properties"].items()}
            assert given == describe(policy())
    (embedding,) = description["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"].values()
    assert embedding["schema"]["$ref"] == "#/components/schemas/EmbeddingRequest"
    schemas = description["components"]["schemas"]
    assert {"input", "dimensions", "pooling", "cache_salt"} < schemas["EmbeddingRequest"]["properties"].keys()
    given = schemas["ResponseRequest"]["properties"]
    assert {"instructions", "tools", "top_k", "kv_policy", "cache_salt"} < given.keys()
    text, items = given["input"]["anyOf"]
    assert text == {"type": "string"}
    assert items["items"] == {"$ref": "#/components/schemas/InputItem"}
    assert live.http.get("/docs").status_code == 200


def test_a_probe_may_ask_by_head(live: Live) -> None:
    for path in ("/health", "/ready"):
        answer = live.http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    live.engine.ready = False
    assert live.http.head("/ready").status_code == 503
