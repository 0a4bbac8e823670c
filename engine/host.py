"""What the machine, or the container around the process, gives: cores and memory."""

import math
import os
from pathlib import Path
from typing import Final

_GROUP: Final = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores that this process may use: its affinity, or its container's quota if that is less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (_GROUP / "cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or its quota is "max"
        return cores


def available_memory() -> int:
    """Bytes that the system calls available, or that the container's limit leaves if that is less."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    try:
        limit = int((_GROUP / "memory.max").read_text())
        return max(0, min(free, limit - int((_GROUP / "memory.current").read_text())))
    except (OSError, ValueError):  # no cgroup v2, or its limit is "max"
        return free


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
