"""A server of one's own for the length of a measurement: `octavo serve` as a child process, on a free port."""

import argparse
import http.client
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.errors import ConfigError, OctavoError

START_SECONDS = 600.0
"""A large checkpoint on a slow disk takes minutes to load; no sound start takes longer than this."""

_STOP_SECONDS = 10.0
_LAST_LINES = 15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that say which server is measured."""
    group = parser.add_argument_group("the server")
    group.add_argument("--model", default="embedded", help="what `octavo serve` loads (default: %(default)s)")
    group.add_argument(
        "--serve-args",
        default="",
        metavar="'FLAGS'",
        help="more flags for every server that is started, in one quoted text, such as '--threads 2 --dtype bfloat16'",
    )
    group.add_argument("--port", type=int, default=0, help="port for the servers (default: any free one)")


def flags_of(args: argparse.Namespace) -> list[str]:
    """What every server gets, from the flags of ``add_arguments``. Raises ConfigError for unbalanced quotes."""
    try:
        return [args.model, *shlex.split(args.serve_args)]
    except ValueError as error:
        raise ConfigError(f"--serve-args {args.serve_args!r}: {str(error).lower()}") from None


@contextmanager
def local_server(flags: Sequence[str], port: int = 0) -> Iterator[str]:
    """The address of an `octavo serve` with these flags, which is ready now and stopped when the block ends.

    SIGTERM acts like Ctrl-C within the block, so that the server never outlives its measurement.

    Raises OctavoError, with the server's last words, when it ends by itself: before it is ready or within the block.
    """
    port = port or _free_port()
    # -P: a folder called `server` where the user happens to be must not hide Octavo's.
    command = [sys.executable, "-P", "-m", "server.cli", "serve", *flags, "--port", str(port), "--drain-timeout", "0"]
    with _sigterm_as_interrupt(), tempfile.NamedTemporaryFile(prefix="octavo-serve-", suffix=".log") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, port)
            yield f"http://127.0.0.1:{port}"
            _check_alive(process)
        except OctavoError as error:
            # A process that has just closed its connections may need a moment to be seen as ended.
            if _ended(process, within=0.5):
                raise OctavoError(f"{error}\n{_last_words(Path(log.name), process, flags)}") from None
            raise
        finally:
            _stop(process)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        _check_alive(process)
        if _is_ready(port):
            return
        time.sleep(0.1)
    raise OctavoError(f"the server was not ready after {START_SECONDS:g} s")


def _check_alive(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        raise OctavoError("the server that was to be measured has ended")


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _ended(process: subprocess.Popen[bytes], within: float) -> bool:
    try:
        process.wait(within)
    except subprocess.TimeoutExpired:
        return False
    return True


def _last_words(log: Path, process: subprocess.Popen[bytes], flags: Sequence[str]) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
    head = f"`octavo serve {shlex.join(flags)}` exited with {process.returncode}" + (", saying" if lines else "")
    return "\n".join([head, *(f"  {line}" for line in lines)])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    if not _ended(process, _STOP_SECONDS):
        process.kill()
        process.wait()
