"""End to end, against a server whose delays are known and whose clock is the client's."""

import argparse
import asyncio
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import serve
from engine.errors import ConfigError
from tests.bench.fake_openai import FakeServer, serving


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving(FakeServer()) as server:
        yield server


def measure(server: FakeServer, tmp_path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Run the command; (exit code, its JSON document)."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    report = tmp_path / "report.json"
    common = ["--base-url", server.url, "--json", str(report), "--details", "--input-len", "20"]
    code = serve.run(parser.parse_args([*common, *flags]))
    return code, json.loads(report.read_text())


def test_ttft_and_itl_equal_the_servers_delays(fake: FakeServer, tmp_path: Path) -> None:
    fake.first_delay, fake.gap = 0.08, 0.02
    flags = ["--concurrency", "2", "--num-requests", "4", "--output-len", "6", "--warmup", "0"]
    code, report = measure(fake, tmp_path, *flags)
    assert code == 0
    (level,) = report["levels"]
    assert (level["requests"], level["failed"], level["output_tokens"]) == (4, 0, 24)
    # Delays are at least what was asked for; what came on top is the server's lateness, which its log tells.
    assert level["ms"]["ttft"]["p50"] >= 80
    assert level["ms"]["itl"]["mean"] >= 19.5
    assert level["ms"]["itl"]["mean"] == pytest.approx(level["ms"]["tpot"]["mean"], rel=0.1)
    told = [writes[0] - arrival for writes, arrival in zip(fake.writes, fake.arrivals, strict=True)]
    assert level["ms"]["ttft"]["p50"] / 1e3 == pytest.approx(statistics.median(told), abs=0.03)
    written = [later - earlier for writes in fake.writes for earlier, later in itertools.pairwise(writes)]
    assert level["ms"]["itl"]["p50"] / 1e3 == pytest.approx(statistics.median(written), abs=0.005)
    assert level["ms"]["latency"]["mean"] == pytest.approx(
        level["ms"]["ttft"]["mean"] + 5 * level["ms"]["tpot"]["mean"], rel=0.01
    )


def test_the_document_says_how_it_came_about_and_keeps_the_key_secret(fake: FakeServer, tmp_path: Path) -> None:
    flags = ["--concurrency", "1", "--num-requests", "2", "--output-len", "2", "--api-key", "sk-secret"]
    _, report = measure(fake, tmp_path, *flags)
    assert report["command"].startswith("octavo bench serve --base-url http://127.0.0.1")
    assert report["server"] == {"base_url": fake.url, "model": "fake-model", "version": {"version": "1.2.3"}}
    assert report["arguments"]["output_len"] == 2
    assert report["levels"][0]["total_tokens_per_s"] > report["levels"][0]["output_tokens_per_s"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", report["timestamp"])
    assert all(headers["Authorization"] == "Bearer sk-secret" for headers in fake.headers)
    assert "sk-secret" not in json.dumps(report)


def test_every_request_of_a_session_is_different_and_the_next_session_repeats_them(
    fake: FakeServer, tmp_path: Path
) -> None:
    flags = ["--concurrency", "1,2", "--num-requests", "3", "--output-len", "1", "--repeats", "2"]
    measure(fake, tmp_path, *flags)
    first, fake.bodies = fake.bodies, []
    assert len(first) == 2 * 2 * (3 + 1)  # the warm-ups too
    assert len({json.dumps(body["prompt"][:8]) for body in first}) == len(first)
    assert all(body["ignore_eos"] and body["stream"] and body["temperature"] == 0 for body in first)
    measure(fake, tmp_path, *flags)
    assert sorted(map(json.dumps, fake.bodies)) == sorted(map(json.dumps, first))


def test_warmups_are_not_measured(fake: FakeServer, tmp_path: Path) -> None:
    flags = ["--concurrency", "2", "--num-requests", "2", "--warmup", "3", "--output-len", "1"]
    _, report = measure(fake, tmp_path, *flags)
    assert len(fake.bodies) == 5
    assert report["levels"][0]["requests"] == 2


def test_failures_are_counted_and_told_apart(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.broken, fake.cut = frozenset({1, 3}), frozenset({4})
    flags = ["--concurrency", "2", "--num-requests", "6", "--warmup", "0", "--output-len", "4"]
    code, report = measure(fake, tmp_path, *flags)
    assert code == 1
    assert (report["levels"][0]["requests"], report["levels"][0]["failed"]) == (3, 3)
    assert report["errors"]["HTTP 500: it broke"] == 2
    assert len(report["errors"]) == 2
    assert report["levels"][0]["output_tokens"] == 12
    told = capsys.readouterr().err
    assert "3 of 6 requests failed:" in told
    assert "2 x HTTP 500: it broke" in told


def test_a_timeout_is_a_failed_request_and_not_an_exception(fake: FakeServer, tmp_path: Path) -> None:
    fake.first_delay = 5.0
    flags = ["--concurrency", "2", "--num-requests", "2", "--warmup", "0", "--timeout", "0.1"]
    code, report = measure(fake, tmp_path, *flags)
    assert code == 1
    assert report["errors"] == {"no complete answer within 0.1 s": 2}


@pytest.mark.parametrize("asked", [True, False])
def test_without_usage_chunks_are_counted(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: bool
) -> None:
    fake.usage = False
    flags = [
        "--concurrency",
        "1",
        "--num-requests",
        "2",
        "--output-len",
        "5",
        *([] if asked else ["--no-stream-usage"]),
    ]
    code, report = measure(fake, tmp_path, *flags)
    assert code == 0
    assert report["levels"][0]["output_tokens"] == 10
    assert report["levels"][0]["prompt_tokens"] == 40  # known to the client, for it sent token ids
    assert "without usage" in capsys.readouterr().out
    assert all(("stream_options" in body) == asked for body in fake.bodies)


def test_with_usage_tokens_are_counted_however_they_are_chunked(fake: FakeServer, tmp_path: Path) -> None:
    fake.tokens_per_chunk, fake.gap = 4, 0.02
    flags = ["--concurrency", "1", "--num-requests", "1", "--output-len", "8"]
    _, report = measure(fake, tmp_path, *flags)
    (level,) = report["levels"]
    assert level["output_tokens"] == 8
    assert level["ms"]["tpot"]["mean"] == pytest.approx(level["ms"]["itl"]["mean"] / 7, rel=0.2)


def test_prefix_cache_hits_are_reported(fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.cached_tokens = 4
    measure(fake, tmp_path, "--concurrency", "1", "--num-requests", "1", "--output-len", "1")
    assert "prefix cache answered 57%" in capsys.readouterr().out


def test_chat_is_measured_alike_and_its_role_chunk_is_no_token(fake: FakeServer, tmp_path: Path) -> None:
    fake.first_delay, fake.usage = 0.05, False
    flags = ["--endpoint", "chat", "--concurrency", "1", "--num-requests", "2", "--output-len", "3"]
    code, report = measure(fake, tmp_path, *flags)
    assert code == 0
    assert report["levels"][0]["output_tokens"] == 6
    assert report["levels"][0]["ms"]["ttft"]["p50"] >= 50
    assert report["levels"][0]["prompt_tokens"] is None
    (message,) = fake.bodies[0]["messages"]
    assert len(message["content"].split()) == 20


@pytest.mark.parametrize(("level", "most"), [("3", 3), ("inf", 12)])
def test_a_closed_loop_keeps_its_bound(fake: FakeServer, tmp_path: Path, level: str, most: int) -> None:
    fake.first_delay = 0.05
    measure(fake, tmp_path, "--concurrency", level, "--num-requests", "12", "--output-len", "2")
    assert fake.most_in_flight == most


def test_an_open_loop_does_not_wait_for_answers(fake: FakeServer, tmp_path: Path) -> None:
    fake.first_delay = 0.4
    flags = ["--rate", "100", "--num-requests", "10", "--warmup", "0", "--output-len", "1"]
    code, report = measure(fake, tmp_path, *flags)
    assert code == 0
    assert fake.most_in_flight == 10
    assert report["levels"][0]["label"] == "100/s"


def test_goodput_and_repeats_appear_in_the_table(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--concurrency", "1,2", "--num-requests", "2", "--output-len", "2", "--repeats", "2"]
    measure(fake, tmp_path, *flags, "--goodput", "ttft=10000,tpot=10000")
    shown = capsys.readouterr().out
    assert re.search(r"c=1 +c=2\n", shown)
    assert re.search(r"requests +4 +4\n", shown)
    assert re.search(r"of all +100% +100%\n", shown)
    assert "lowest run" in shown
    table = shown.split("\n\n", 1)[1].split("note")[0].split("wrote")[0].rstrip("\n").split("\n")
    assert len({len(line) for line in table}) == 1  # aligned


def test_a_plot_is_drawn(fake: FakeServer, tmp_path: Path) -> None:
    fake.gap, fake.broken = 0.001, frozenset({2})
    picture = tmp_path / "plot.png"
    flags = ["--concurrency", "1,2", "--num-requests", "4", "--output-len", "4", "--plot", str(picture)]
    measure(fake, tmp_path, *flags)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_server_that_refuses_token_ids_gets_a_hint(fake: FakeServer, tmp_path: Path) -> None:
    fake.refuse_ids = True
    with pytest.raises(ConfigError, match=r"prompt must be a string.*--prompt-format text"):
        measure(fake, tmp_path, "--concurrency", "1")
    flags = ["--prompt-format", "text", "--concurrency", "1", "--num-requests", "1", "--output-len", "1"]
    code, _ = measure(fake, tmp_path, *flags)
    assert code == 0


def test_what_was_measured_before_the_server_failed_is_reported(fake: FakeServer, tmp_path: Path) -> None:
    fake.broken = frozenset({3})  # the second level's warm-up
    flags = ["--concurrency", "1,2", "--num-requests", "2", "--output-len", "1"]
    with pytest.raises(ConfigError, match=r"warm-up request .* failed: HTTP 500"):
        measure(fake, tmp_path, *flags)
    (level,) = json.loads((tmp_path / "report.json").read_text())["levels"]
    assert (level["label"], level["requests"]) == ("c=1", 2)


def test_no_server_is_one_clear_line(fake: FakeServer, tmp_path: Path) -> None:
    fake.url = "http://127.0.0.1:1"
    with pytest.raises(ConfigError, match=r"no server answers at http://127\.0\.0\.1:1: cannot connect"):
        measure(fake, tmp_path)


def test_a_v1_at_the_end_of_the_address_is_understood(fake: FakeServer, tmp_path: Path) -> None:
    fake.url += "/v1/"
    code, _ = measure(fake, tmp_path, "--concurrency", "1", "--num-requests", "1", "--output-len", "1")
    assert code == 0


def test_ctrl_c_prints_what_has_been_measured(fake: FakeServer) -> None:
    fake.first_delay = 0.05
    script = "import sys; from bench import cli; import argparse as a; p = a.ArgumentParser(); cli.add_arguments(p)"
    flags = ["serve", "--base-url", fake.url, "--concurrency", "1", "--num-requests", "1000", "--output-len", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", f"{script}; sys.exit(cli.run(p.parse_args()))", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 10
        while len(fake.bodies) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        shown, told = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.search(r"requests +\d+\n", shown)
    assert re.search(r"interrupted +1\n", shown)
    assert "interrupted; the figures are of what had ended by then" in told
    assert "Traceback" not in told


def test_no_task_or_thread_is_left_behind(fake: FakeServer, tmp_path: Path) -> None:
    before = threading.active_count()
    measure(fake, tmp_path, "--concurrency", "4", "--num-requests", "4", "--output-len", "2")
    assert threading.active_count() <= before
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()
