"""What `deploy/` holds: sound, and true of this server."""

import argparse
import json
import math
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from engine.config import EngineConfig, load_all
from server.commands import serve
from server.config import ServerConfig
from server.listener import LAST_WORDS
from server.metrics import Metrics
from tests.deploy.test_dockerfile import LAST_STAGE, ROOT
from tests.server.fakes import FakeEngine

DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
KUBERNETES = DEPLOY / "kubernetes"

ADDED = {"instance", "job", "le"}
"""Labels that Prometheus, or a histogram, adds to the page's own."""


def documents(path: Path) -> list[Any]:
    """All that a YAML or JSON file holds."""
    text = path.read_text()
    return [json.loads(text)] if path.suffix == ".json" else [one for one in yaml.safe_load_all(text) if one]


def kinds(name: str) -> dict[str, Any]:
    """The objects in a file for Kubernetes, by kind."""
    return {one["kind"]: one for one in documents(KUBERNETES / name)}


def deployment() -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod's specification, and its container's."""
    pod = kinds("octavo.yaml")["Deployment"]["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


def texts(value: object) -> Iterator[str]:
    """Every text in a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts(one)


@pytest.fixture(scope="module")
def page() -> dict[str, set[str]]:
    """The labels of each series on our page."""
    metrics = Metrics()
    metrics.attach(FakeEngine(), "fake")
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_it_parses_and_names_only_our_metrics(path: Path, page: dict[str, set[str]]) -> None:
    found = [text for document in documents(path) for text in texts(document)]
    assert found
    for text in found:
        for name, selector in re.findall(r"octavo:([a-z]\w*\b)(?!_?\()(?:\{([^}]*)\})?", text):
            assert f"octavo:{name}" in page, text
            used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert used <= page[f"octavo:{name}"] | ADDED, text


@pytest.mark.parametrize("name", ["prometheus/rules.yml", "grafana/dashboards/octavo.json"])
def test_what_is_grouped_by_exists(name: str, page: dict[str, set[str]]) -> None:
    known = set().union(*page.values()) | ADDED
    groups = [group for text in texts(documents(DEPLOY / name)) for group in re.findall(r"(?:by|on) \(([^)]*)\)", text)]
    assert groups
    assert {label.strip() for group in groups for label in group.split(",")} <= known


def test_the_dashboard_shows_what_an_operator_asks_for() -> None:
    (dashboard,) = documents(DEPLOY / "grafana/dashboards/octavo.json")
    shown = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    for name in (
        "time_to_first_token_seconds",
        "request_time_per_output_token_seconds",
        "generation_tokens_total",
        "num_requests_waiting",
        "request_queue_time_seconds",
        "kv_cache_usage_perc",
        "prefix_cache_hits_total",
        "kv_tokens_evicted_total",
    ):
        assert f"octavo:{name}" in shown
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_grafana_finds_its_data_and_its_dashboard() -> None:
    compose = documents(DEPLOY / "compose.yaml")[0]["services"]
    (source,) = documents(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    (provider,) = documents(DEPLOY / "grafana/provisioning/dashboards/octavo.yaml")[0]["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose["grafana"]["volumes"]
    (targets,) = documents(DEPLOY / "prometheus/prometheus.yml")[0]["scrape_configs"][0]["static_configs"]
    assert targets["targets"] == ["octavo:8000"]


def test_compose_opens_nothing_but_loopback() -> None:
    services = documents(DEPLOY / "compose.yaml")[0]["services"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes/octavo.yaml"])
def test_the_arguments_are_ones_that_the_server_takes(name: str) -> None:
    given = documents(DEPLOY / "compose.yaml")[0]["services"]["octavo"]["command"]
    arguments = given if name == "compose.yaml" else deployment()[1]["args"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    serve.add_arguments(parser)
    _, config = load_all((EngineConfig, ServerConfig), vars(parser.parse_args(arguments)), {})
    assert (config.log_format, config.log_requests, config.log_request_content) == ("json", True, None)


def test_the_image_is_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    compose = documents(DEPLOY / "compose.yaml")[0]["services"]["octavo"]
    assert compose["image"] == deployment()[1]["image"] == f"octavo:{version}"


def test_a_server_that_is_told_to_stop_is_given_the_time() -> None:
    needed = math.ceil(ServerConfig().drain_timeout) + LAST_WORDS
    compose = documents(DEPLOY / "compose.yaml")[0]["services"]["octavo"]
    assert int(compose["stop_grace_period"].removesuffix("s")) > needed
    pod, container = deployment()
    _, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > int(seconds) + needed


def test_probes_ask_what_they_mean() -> None:
    _, container = deployment()
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300


def test_the_pod_is_the_images_user_and_can_write_to_the_cache_only() -> None:
    pod, container = deployment()
    (created,) = [rest for word, rest in LAST_STAGE if word == "RUN"]
    assert f"--uid {pod['securityContext']['runAsUser']} " in created
    assert container["securityContext"]["readOnlyRootFilesystem"]
    (volume,) = [rest for word, rest in LAST_STAGE if word == "VOLUME"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {volume, "/tmp"}


def test_selectors_find_the_pods() -> None:
    objects = kinds("octavo.yaml")
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == objects["Service"]["spec"]["selector"] == labels
    pool = kinds("inference-pool.yaml")["InferencePool"]["spec"]
    assert pool["selector"]["matchLabels"] == labels
    assert pool["targetPorts"] == [{"number": deployment()[1]["ports"][0]["containerPort"]}]
    assert kinds("autoscaling.yaml")["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "octavo"


def test_the_autoscalers_metric_is_what_the_adapter_makes_of_ours(page: dict[str, set[str]]) -> None:
    (rule,) = documents(KUBERNETES / "prometheus-adapter.yaml")[0]["rules"]["custom"]
    pattern = re.search(r'__name__=~"([^"]*)"', rule["seriesQuery"])
    assert pattern is not None
    replacement = rule["name"]["as"].replace("$1", r"\1")
    served = {re.sub(rule["name"]["matches"], replacement, name) for name in page if re.fullmatch(pattern[1], name)}
    (metric,) = kinds("autoscaling.yaml")["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in served
    assert len(served) == 2


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules rules.yml", "test rules rules_test.yml"]
)
def test_promtool_accepts_the_rules(command: str) -> None:
    done = subprocess.run(
        ["promtool", *command.split()], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
