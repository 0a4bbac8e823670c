"""What the machine, or the container around the process, gives: cores and memory."""

import ctypes
import math
import os
from pathlib import Path
from typing import Final

_KEEP: Final = {
    -8: 1,  # M_ARENA_MAX: one heap for all threads, since only the first can grow without limit
    -3: 32 << 20,  # M_MMAP_THRESHOLD: larger pieces, such as the KV cache, stay apart; glibc allows no more
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: free memory that is kept at the heap's end
    -2: 64 << 20,  # M_TOP_PAD: what is taken more than needed when the heap grows
}
"""Options of mallopt(3)."""
_GROUP: Final = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores that this process may use: its affinity, or its container's quota if that is less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (_GROUP / "cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or its quota is "max"
        return cores


def keep_freed_memory() -> None:
    """Have the C library keep what tensors free for the tensors of the next step, where it is glibc.

    By default it hands large pieces back to the system and gets them anew, zeroed page by page: up to 46,000 faults
    in a step of 2,048 prompt tokens of SmolLM2, some 5% of the step. What is kept is at most what a step once needed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _KEEP.items():
            mallopt(option, value)


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
