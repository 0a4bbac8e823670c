"""Schemathesis, which tries an API by its own description. A longer run around a real model: `make compat`."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from server.config import ServerConfig
from tests.server.conftest import Live
from tests.server.fakes import FakeEngine

CONFIG = Path(__file__).parents[1] / "compat" / "schemathesis.toml"
KEY = "a-key"


def test_schemathesis_finds_no_fault(start: Callable[..., Live], tmp_path: Path) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, api_key=(KEY,)), KEY)
    flags = ["run", f"{live.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--max-examples", "5"]
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(CONFIG), *flags]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "13 selected / 13 total" in run.stdout
    assert not live.engine.open
