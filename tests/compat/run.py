"""Runs other people's suites against Octavo, and prints the rows of docs/compatibility.md: `make compat`.

Each suite gets an environment of its own in a temporary folder, from the package index, and a server of its own around
the embedded model, in float32, so that answers do not depend on what else is in a batch.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.compat.suites import SUITES, Suite

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KEY = "compat"
_COUNTS = (
    (r"(\d+) passed", r"(\d+) (?:failed|errors?)\b"),  # pytest
    (r"^# pass (\d+)", r"^# fail (\d+)"),  # node
    (r"generated, (\d+) passed", r"(\d+) unique failures?"),  # Schemathesis
)


@contextlib.contextmanager
def server(flags: tuple[str, ...]) -> Iterator[str]:
    """The address of a server that is ready, without /v1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--dtype", "float32", *flags]
    if "--api-key" not in flags:
        command += ["--api-key", KEY]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=5):
                break
            assert process.poll() is None, "the server did not start"
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def prepare(suite: Suite, work: Path) -> str:
    """Install what the suite needs; returns the version of the package that it is about."""
    if suite.npm:
        shutil.copy(HERE / "openai_node.test.mjs", work)
        subprocess.run(["npm", "install", "--silent", "--no-fund", *suite.npm], cwd=work, check=True)
        shown = subprocess.run(["npm", "ls", suite.package], cwd=work, capture_output=True, text=True, check=True)
        return shown.stdout.rpartition("@")[2].strip()
    subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
    pip = [work / "venv/bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for arguments in suite.installs:
        subprocess.run([*pip, "install", *arguments], check=True)
    version = f"import importlib.metadata as m; print(m.version({suite.package!r}))"
    return subprocess.run([work / "venv/bin/python", "-c", version], capture_output=True, text=True, check=True).stdout


def run(suite: Suite, work: Path, tokenizer: Path, llama_cpp: Path | None) -> str:
    """One suite's row."""
    version = prepare(suite, work).strip()
    with server(suite.serve) as url:
        places: Mapping[str, object] = {
            "bin": work / "venv/bin",
            "url": f"{url}/v1",
            "root": url,
            "key": KEY,
            "here": HERE,
            "work": work,
            "llama_cpp": llama_cpp,
        }
        variables = {name: value.format_map(places) for name, value in suite.variables.items()}
        key = shlex.split(" ".join(suite.serve))[-1].split(",")[0] if "--api-key" in suite.serve else KEY
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "OPENAI_BASE_URL": f"{url}/v1",
            "OPENAI_API_KEY": key,
            "TOKENIZER": str(tokenizer),
            "PORT": url.rpartition(":")[2],
            **variables,
        }
        command = suite.command.format_map(places)
        folder = ROOT / suite.folder.format_map(places)
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    sys.stdout.write(done.stdout + done.stderr)
    passed, failed = counts(done.stdout)
    if not passed and not failed:
        return f"| {suite.name} | {version} | did not run | |"
    return f"| {suite.name} | {version} | {passed} | {failed} |"


def counts(output: str) -> tuple[int, int]:
    """How many tests passed, and how many failed, by what a suite printed last."""
    for passed, failed in _COUNTS:
        if found := re.findall(passed, output, re.MULTILINE):
            failures = re.findall(failed, output, re.MULTILINE)
            return int(found[-1]), int(failures[-1]) if failures else 0
    return 0, 0


def main() -> None:
    """Run the suites that are named, or all."""
    names = [suite.name for suite in SUITES]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"one of {', '.join(names)}; all by default")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="llama.cpp's sources; without, not run")
    given = parser.parse_args()
    if unknown := set(given.suites) - set(names):
        parser.error(f"there is no suite {', '.join(sorted(unknown))}, but {', '.join(names)}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="octavo-compat-") as folder:
        tokenizer = Path(folder) / "tokenizer"
        subprocess.run([sys.executable, HERE / "save_tokenizer.py", tokenizer], cwd=ROOT, check=True)
        for suite in SUITES:
            if suite.name not in (given.suites or names) or (suite.name == "llama.cpp" and given.llama_cpp is None):
                continue
            work = Path(folder) / suite.name
            work.mkdir()
            print(f"== {suite.name}", flush=True)
            rows.append(run(suite, work, tokenizer, given.llama_cpp))
            shutil.rmtree(work)
    print("\n| suite | version | passed | failed |\n|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
