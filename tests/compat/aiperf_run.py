"""aiperf against a running server (OPENAI_BASE_URL, OPENAI_API_KEY); TOKENIZER is a folder with its tokenizer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REQUESTS, OUTPUT = 6, 8


@pytest.mark.parametrize("kind", ["chat", "completions"])
@pytest.mark.parametrize("more", [("--streaming",), ()])
def test_every_request_of_a_load_succeeds(tmp_path: Path, kind: str, more: tuple[str, ...]) -> None:
    url, key = os.environ["OPENAI_BASE_URL"].removesuffix("/v1"), os.environ["OPENAI_API_KEY"]
    command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--model", "SmolLM2-135M-Instruct"]
    command += ["--url", url, "--api-key", key, "--endpoint-type", kind, *more, "--tokenizer", os.environ["TOKENIZER"]]
    command += ["--isl", "32", "--osl", str(OUTPUT), "--request-count", str(REQUESTS), "--concurrency", "2"]
    command += ["--extra-inputs", "ignore_eos:true", "--ui", "none", "--artifact-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (file,) = tmp_path.rglob("profile_export_aiperf.json")
    result = json.loads(file.read_text())
    assert result["request_count"]["avg"] == REQUESTS
    assert result["error_summary"] == []
    assert result["usage_completion_tokens"]["avg"] == OUTPUT
