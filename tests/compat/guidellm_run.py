"""guidellm against a running server (OPENAI_BASE_URL, OPENAI_API_KEY); TOKENIZER is a folder with its tokenizer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REQUESTS, OUTPUT = 6, 8


@pytest.mark.parametrize(
    ("path", "profile"),
    [("/v1/chat/completions", "kind=synchronous"), ("/v1/completions", "kind=concurrent,streams=2")],
)
def test_every_request_of_a_load_succeeds(tmp_path: Path, path: str, profile: str) -> None:
    url, key = os.environ["OPENAI_BASE_URL"].removesuffix("/v1"), os.environ["OPENAI_API_KEY"]
    result = tmp_path / "result.json"
    backend = f"kind=openai_http,target={url},model=SmolLM2-135M-Instruct,api_key={key},request_format={path}"
    command = [str(Path(sys.executable).with_name("guidellm")), "run", "--backend", backend, "--profile", profile]
    command += ["--constraint", f"kind=max_requests,count={REQUESTS}", "--disable-console-interactive"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={OUTPUT}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={os.environ['TOKENIZER']}"]
    command += ["--output", f"kind=json,path={result}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (benchmark,) = json.loads(result.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (REQUESTS, 0, 0)
    requests = benchmark["requests"]["successful"]
    assert {request["output_metrics"]["text_tokens"] for request in requests} == {OUTPUT}
