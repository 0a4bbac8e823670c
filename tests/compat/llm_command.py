"""The `llm` command against a running server, which OPENAI_BASE_URL and OPENAI_API_KEY name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MODEL = "SmolLM2-135M-Instruct"
CONFIG = """
- model_id: octavo
  model_name: {model}
  api_base: {url}
  api_key_name: octavo
  can_stream: true
  supports_schema: true
  supports_tools: true
- model_id: octavo-completion
  model_name: {model}
  api_base: {url}
  api_key_name: octavo
  completion: true
- model_id: octavo-elsewhere
  model_name: another
  api_base: {url}
  api_key_name: octavo
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def llm(tmp_path: Path) -> Run:
    """The command, in a home of its own."""
    url = os.environ["OPENAI_BASE_URL"]
    (tmp_path / "extra-openai-models.yaml").write_text(CONFIG.format(model=MODEL, url=url))
    (tmp_path / "keys.json").write_text(json.dumps({"octavo": os.environ["OPENAI_API_KEY"]}))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}

    def run(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("llm")), *arguments]
        return subprocess.run(
            command, env=environment, input=given, capture_output=True, text=True, timeout=120, check=False
        )

    return run


def test_the_models_are_listed(llm: Run) -> None:
    assert "octavo" in llm("models").stdout


@pytest.mark.parametrize("more", [(), ("--no-stream",)])
def test_a_prompt_is_answered(llm: Run, more: tuple[str, ...]) -> None:
    options = ("-o", "temperature", "0", "-o", "max_tokens", "24")
    done = llm("-m", "octavo", *more, *options, "What is the capital of France?")
    assert "Paris" in done.stdout, done.stderr


def test_a_system_prompt_and_standard_input(llm: Run) -> None:
    done = llm("-m", "octavo", "-s", "Be brief.", "-o", "max_tokens", "8", given="What is the capital of France?")
    assert (done.returncode, bool(done.stdout.strip())) == (0, True), done.stderr


def test_a_conversation_goes_on(llm: Run) -> None:
    options = ("-m", "octavo", "-o", "temperature", "0", "-o", "max_tokens", "16")
    assert llm(*options, "My name is Ann.").returncode == 0
    done = llm("-c", "-o", "temperature", "0", "-o", "max_tokens", "16", "What is my name?")
    assert (done.returncode, bool(done.stdout.strip())) == (0, True), done.stderr


def test_a_schema(llm: Run) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"enum": ["Paris", "Rome"]}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    done = llm("-m", "octavo", "-o", "temperature", "0", "--schema", json.dumps(schema), "Which is France's capital?")
    assert json.loads(done.stdout)["capital"] in ("Paris", "Rome"), done.stderr


def test_tools_are_offered(llm: Run) -> None:
    """Whether so small a model calls them is its own affair."""
    done = llm("-m", "octavo", "-T", "llm_version", "-o", "max_tokens", "16", "Which version of llm is this?")
    assert done.returncode == 0, done.stderr


def test_completions(llm: Run) -> None:
    done = llm("-m", "octavo-completion", "-o", "temperature", "0", "-o", "max_tokens", "8", "Two, four, six,")
    assert "eight" in done.stdout, done.stderr


def test_log_probabilities_and_usage_are_logged(llm: Run) -> None:
    assert llm("-m", "octavo", "-o", "max_tokens", "4", "Hello").returncode == 0
    (logged,) = json.loads(llm("logs", "--json", "-n", "1").stdout)
    assert logged["input_tokens"] > 0
    assert logged["output_tokens"] == 4


def test_an_error_is_shown(llm: Run) -> None:
    done = llm("-m", "octavo-elsewhere", "Hello")
    assert done.returncode != 0
    assert "does not exist here" in done.stderr
