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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from bench import flags
from engine.errors import ConfigError, OctavoError

OCTAVO = (sys.executable, "-P", "-m", "server.cli")
"""The `octavo` command. -P: a folder called `server` where the user happens to be must not hide Octavo's."""

START_SECONDS = 600.0
"""A large checkpoint on a slow disk takes minutes to load; no sound start takes longer than this."""

Found = TypeVar("Found")

_STOP_SECONDS = 10.0
_LINGER_SECONDS = 0.5
"""A process that has just closed its connections may need a moment to be seen as ended."""
_LAST_LINES = 15


def add_arguments(parser: argparse.ArgumentParser, *, base_url: str | None = None) -> None:
    """Declare the flags that say which server is measured; ``base_url`` is the help of --base-url, if there is one."""
    group = parser.add_argument_group("the server")
    group.add_argument("--model", default="embedded", help="what `octavo serve` loads (default: %(default)s)")
    group.add_argument(
        "--serve-args",
        default="",
        metavar="'FLAGS'",
        help="more flags for every server that is started, in one quoted text, such as '--threads 2 --dtype bfloat16'; "
        "a single word needs an equals sign, as in --serve-args=--metrics-compat",
    )
    group.add_argument("--port", type=int, default=0, help="port for the servers (default: any free one)")
    group.add_argument("--timeout", type=float, default=600.0, help="seconds per request (default: %(default)g)")
    if base_url is not None:
        group.add_argument("--base-url", metavar="URL", help=base_url)


def check(args: argparse.Namespace) -> None:
    """Check the flags of ``add_arguments``. Raises ConfigError, naming the flag at fault."""
    flags.positive(args, "timeout")
    if not 0 <= args.port < 2**16:
        raise ConfigError(f"--port must be between 0 and 65535, not {args.port}")
    if address := vars(args).get("base_url"):
        flags.http_address(address, "--base-url")
    _flags_of(args)


def measure_each(
    args: argparse.Namespace, servers: Iterable[tuple[str, Sequence[str]]], measure: Callable[[str, str], Found]
) -> tuple[list[tuple[str, Found]], bool]:
    """What ``measure(label, address)`` finds at an `octavo serve` with the flags of each label, one after the other.

    Where there is a --base-url, that server is measured instead of them all, and its address is its label.

    Returns also whether Ctrl-C ended it: then the servers before are in the list, and the one of that moment is not.
    """
    found: list[tuple[str, Found]] = []
    try:
        if address := vars(args).get("base_url"):
            return [(address, measure(address, address))], False
        for label, more in servers:
            with local_server([*_flags_of(args), *more], args.port) as address:
                found.append((label, measure(label, address)))
    except KeyboardInterrupt:
        told = "the figures are of the servers that had been measured by then" if found else "nothing was measured yet"
        print(f"interrupted; {told}", file=sys.stderr)
        return found, True
    return found, False


def _flags_of(args: argparse.Namespace) -> list[str]:
    """What every server gets. Raises ConfigError for unbalanced quotes."""
    try:
        return [args.model, *shlex.split(args.serve_args)]
    except ValueError as error:
        raise ConfigError(f"--serve-args {args.serve_args!r}: {str(error).lower()}") from None


@contextmanager
def local_server(serve_flags: Sequence[str], port: int = 0) -> Iterator[str]:
    """The address of an `octavo serve` with these flags, which is ready now and stopped when the block ends.

    SIGTERM acts like Ctrl-C within the block, so that the server never outlives its measurement.

    Raises OctavoError, with the server's last words, when it ends by itself: before it is ready or within the block.
    """
    port = port or _free_port()
    command = [*OCTAVO, "serve", *serve_flags, "--port", str(port), "--drain-timeout", "0"]
    with _sigterm_as_interrupt(), tempfile.NamedTemporaryFile(prefix="octavo-serve-", suffix=".log") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, port)
            yield f"http://127.0.0.1:{port}"
            _check_alive(process)
        except OctavoError as error:
            if _ended(process, _LINGER_SECONDS):
                raise OctavoError(f"{error}\n{_last_words(Path(log.name), process, serve_flags)}") from None
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


def _last_words(log: Path, process: subprocess.Popen[bytes], serve_flags: Sequence[str]) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
    head = f"`octavo serve {shlex.join(serve_flags)}` exited with {process.returncode}" + (", saying" if lines else "")
    return "\n".join([head, *(f"  {line}" for line in lines)])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    if not _ended(process, _STOP_SECONDS):
        process.kill()
        process.wait()
