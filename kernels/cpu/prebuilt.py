"""`python -m kernels.cpu.prebuilt`: compile the native library ahead, for every x86-64 CPU.

It is found beside the sources from then on, and nothing is compiled at start: for containers, whose last stage has no
compiler, and which do not run where they were built.
"""

import platform
import subprocess
import sys
from pathlib import Path

from kernels.cpu.levels import LEVELS, location
from kernels.cpu.library import PREBUILT, compile_library, sources_digest


def prebuild(folder: Path, compiler: str = "c++") -> list[Path]:
    """One library per level into `folder`. Raises OSError or subprocess.SubprocessError if one cannot be built."""
    digest = sources_digest()
    built = [location(folder, level, digest) for level in LEVELS]
    for target, level in zip(built, LEVELS, strict=True):
        compile_library(target, compiler, *level.machine)
    return built


def main() -> int:
    """Returns the exit code."""
    if platform.machine() != "x86_64":
        print(f"no levels are known for {platform.machine()}: the server will do with torch")
        return 0
    try:
        for path in prebuild(PREBUILT):
            print(path)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"cannot compile: {getattr(error, 'stderr', None) or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
