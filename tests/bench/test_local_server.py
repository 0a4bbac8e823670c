"""Against a few lines that stand for `octavo serve`: what is tested is how a server is started, watched and stopped."""

import argparse
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import local_server
from engine.errors import ConfigError, OctavoError

SERVER = textwrap.dedent("""
    import os, socket, sys
    flags = sys.argv[1:]
    open(flags[1], "w").write(" ".join([str(os.getpid()), *flags]))
    if "--fail" in flags:
        sys.exit("no such\\nflag")
    with socket.create_server(("127.0.0.1", int(flags[flags.index("--port") + 1]))) as listening:
        while True:
            connection, _ = listening.accept()
            with connection:
                if b"/die" in connection.recv(1000):
                    sys.exit("out of memory")
                connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
""")


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the server that stands for Octavo's writes its process id and its flags; its first flag is this path."""
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    monkeypatch.setattr(local_server, "OCTAVO", (sys.executable, "-I", "-S", str(script)))
    return tmp_path / "started"


def is_running(log: Path) -> bool:
    try:
        os.kill(int(log.read_text().split()[0]), 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_is_ready_in_the_block_and_gone_after_it(started: Path) -> None:
    with local_server.local_server([str(started), "--threads", "2"]) as url:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            assert answer.status == 200
        assert is_running(started)
    assert not is_running(started)
    port = url.rpartition(":")[2]
    assert started.read_text().split()[1:] == [
        "serve",
        str(started),
        *("--threads", "2", "--port", port, "--drain-timeout", "0"),
    ]


def test_a_server_that_does_not_start_is_quoted(started: Path) -> None:
    with pytest.raises(OctavoError) as caught, local_server.local_server([str(started), "--fail"]):
        pytest.fail("it is not ready")
    assert str(caught.value).split("\n") == [
        "the server that was to be measured has ended",
        f"`octavo serve {started} --fail` exited with 1, saying",
        "  no such",
        "  flag",
    ]


def test_a_server_that_dies_under_load_explains_the_error_it_caused(started: Path) -> None:
    def measure(url: str) -> None:
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(f"{url}/die", timeout=5)
        raise OctavoError("the connection broke off")

    with (
        pytest.raises(OctavoError, match=r"^the connection broke off\n(.*\n)*  out of memory$"),
        local_server.local_server([str(started)]) as url,
    ):
        measure(url)


def test_a_server_that_died_unnoticed_spoils_the_measurement(started: Path) -> None:
    with pytest.raises(OctavoError, match="has ended"), local_server.local_server([str(started)]) as url:
        kill(url, started)


def kill(url: str, log: Path) -> None:
    """Make it die, and wait until it has."""
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"{url}/die", timeout=5)
    stat = Path(f"/proc/{log.read_text().split()[0]}/stat")
    deadline = time.monotonic() + 5
    while " Z " not in stat.read_text() and time.monotonic() < deadline:
        time.sleep(0.005)


def test_an_error_of_the_measurement_itself_stays_as_it_is_and_stops_the_server(
    started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_server, "_LINGER_SECONDS", 0.01)
    with pytest.raises(OctavoError, match=r"^a stream ended$"), local_server.local_server([str(started)]):
        raise OctavoError("a stream ended")
    assert not is_running(started)


def terminate_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


def test_a_terminated_bench_stops_its_server(started: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), local_server.local_server([str(started)]):
        terminate_this_process()
    assert not is_running(started)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_server_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_server, "_STOP_SECONDS", 0.05)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", stubborn], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        local_server._stop(process)
    assert process.returncode == -signal.SIGKILL


def parse(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    local_server.add_arguments(parser, base_url="measure this one")
    return parser.parse_args(list(given))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to servers that are only pretended, in order."""
    happened: list[str] = []

    @contextmanager
    def pretended(serve_flags: Sequence[str], port: int = 0) -> Iterator[str]:
        happened.append(f"start {' '.join(serve_flags)} on {port}")
        yield "http://it"
        happened.append("stop")

    monkeypatch.setattr(local_server, "local_server", pretended)
    return happened


def test_each_server_is_measured_in_turn_with_the_flags_of_all_and_its_own(log: list[str]) -> None:
    args = parse("--model", "m", "--serve-args", "--dtype 'a b'", "--port", "99")
    servers = [("one", ["--x", "1"]), ("two", []), ("one", ["--x", "1"])]
    found, interrupted = local_server.measure_each(args, servers, lambda label, url: log.append(label) or url)
    assert (found, interrupted) == ([("one", "http://it"), ("two", "http://it"), ("one", "http://it")], False)
    first = ["start m --dtype a b --x 1 on 99", "one", "stop"]
    assert log == [*first, "start m --dtype a b on 99", "two", "stop", *first]


def test_a_running_server_is_measured_instead_of_all(log: list[str]) -> None:
    args = parse("--base-url", "http://there")
    found, _ = local_server.measure_each(args, [("one", []), ("two", [])], lambda label, url: (label, url))
    assert found == [("http://there", ("http://there", "http://there"))]
    assert log == []


@pytest.mark.parametrize(
    ("at", "expected", "told"),
    [
        ("two", [("one", "one")], "the figures are of the servers that had been measured by then"),
        ("one", [], "nothing was measured yet"),
    ],
)
def test_ctrl_c_keeps_what_the_servers_before_gave(
    at: str, expected: list[tuple[str, str]], told: str, log: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(label: str, _: str) -> str:
        if label == at:
            raise KeyboardInterrupt
        return label

    servers = [("one", []), ("two", []), ("three", [])]
    assert local_server.measure_each(parse(), servers, measure) == (expected, True)
    assert capsys.readouterr().err == f"interrupted; {told}\n"
    assert sum(line.startswith("start") for line in log) == len(expected) + 1


@pytest.mark.parametrize(
    "given",
    [
        ["--timeout", "0"],
        ["--timeout", "nan"],
        ["--port", "65536"],
        ["--port", "-1"],
        ["--serve-args", "'"],
        ["--base-url", "localhost:8000"],
    ],
)
def test_a_setting_that_cannot_work_is_one_line_naming_its_flag(given: list[str]) -> None:
    local_server.check(parse())
    with pytest.raises(ConfigError, match=f"^{given[0]} ") as caught:
        local_server.check(parse(*given))
    assert "\n" not in str(caught.value)
