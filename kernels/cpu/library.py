"""Compiling and loading the native library: C++ beside this file, built on the user's machine for its very CPU.

Built once per (sources, compiler, CPU) into a cache folder; about three seconds on two cores. Where there is to be no
compiler, such as in a container, `kernels.cpu.prebuilt` compiles ahead. Linked with OpenMP, whose runtime torch has
loaded already, so native code runs on torch's threads. ctypes releases the GIL during every call.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from kernels.cpu.levels import find
from kernels.cpu.native import NativeOps

SOURCES = Path(__file__).parent
PREBUILT = SOURCES / "prebuilt"
"""Where libraries that were built ahead lie, if any were."""

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-w")

logger = logging.getLogger("octavo.kernels")


def default_cache_dir() -> Path:
    """Where the library goes when nobody said: the folder that the rest of Octavo uses by default too."""
    return Path.home() / ".cache" / "octavo"


def build(cache_dir: Path, compiler: str = "c++", march: str = "native") -> Path:
    """The library for this machine, compiled into `cache_dir` unless it is there already.

    Safe against concurrent starts: each builds under a private name, and the last rename wins.
    Raises OSError or subprocess.SubprocessError if it cannot be built.
    """
    target = cache_dir / f"kernels-{_fingerprint(compiler, march)}.so"
    if not target.exists():
        compile_library(target, compiler, f"-march={march}")
    return target


def compile_library(target: Path, compiler: str, *machine: str) -> None:
    """Compile and link into `target`, which appears whole; `machine` says for which CPUs. Raises as `build`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        command = [compiler, *FLAGS, *machine]

        def compile_one(source: Path) -> str:
            compiled = f"{folder}/{source.stem}.o"
            _run([*command, "-c", str(source), "-o", compiled])
            return compiled

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, sorted(SOURCES.glob("*.cpp"))))
        linked = f"{folder}/kernels.so"
        _run([*command, "-shared", *compiled, "-o", linked])
        os.replace(linked, target)


def open_library(
    cache_dir: Path, compiler: str = "c++", march: str = "native", prebuilt: Path = PREBUILT
) -> NativeOps | None:
    """Open the library, built ahead or now; None, with one line in the log, where that is impossible."""
    try:
        found = find(prebuilt, sources_digest(), cpu_flags()) if march == "native" else None
        return NativeOps(ctypes.CDLL(str(found or build(cache_dir, compiler, march))))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        stderr = getattr(error, "stderr", None)
        reason = stderr.strip().splitlines()[-1] if stderr and stderr.strip() else str(error)
        logger.warning("no native CPU kernels, falling back to torch (several times slower): %s", reason)
        return None


class _Process:
    """The one library of this process: it is opened for whoever asks first, in the folder named until then."""

    cache_dir: Path | None = None

    @functools.cached_property
    def ops(self) -> NativeOps | None:
        return open_library(self.cache_dir or default_cache_dir())


@functools.cache
def _process() -> _Process:
    return _Process()


def load(cache_dir: Path | None = None) -> bool:
    """Open the library now rather than at the first operation; says whether there is one.

    Meant for start-up, so that compiling falls there. `cache_dir` counts only in the first call of a process.
    """
    process = _process()
    process.cache_dir = cache_dir
    return process.ops is not None


def native() -> NativeOps | None:
    """The native operations, opened on first use; None if there are none."""
    return _process().ops


def _fingerprint(compiler: str, march: str) -> str:
    """What a built library depends on: sources, flags, compiler, and the features of the CPU."""
    machine = [sources_digest(), march, platform.machine(), cpu_flags(), _run([compiler, "--version"])]
    return hashlib.sha256(" ".join(machine).encode()).hexdigest()[:16]


def sources_digest() -> str:
    """What a library depends on wherever it runs: sources and flags."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def cpu_flags() -> str:
    """The first processor's feature flags as Linux lists them; elsewhere its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
