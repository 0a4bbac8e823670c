"""Launch parameters by kernel, GPU and shape bucket: `launch_table.json`, checked in; nothing is tuned at run time.

The table is a tree, kernel → compute capability → bucket → parameters. A GPU takes the entries of the newest capability
that is not newer than its own; a bucket is whatever string the kernel's planner makes of its shapes.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from kernels.triton.gpu import GPU


def launch_parameters(kernel: str, gpu: GPU, bucket: str) -> Mapping[str, int]:
    """Parameters by name, `num_warps` and `num_stages` among them. Raises ValueError if the table has none."""
    tables = _tables().get(kernel, {})
    fitting = [capability for capability in tables if capability <= gpu.capability]
    if not fitting or bucket not in tables[max(fitting)]:
        raise ValueError(f"launch_table.json has no {kernel} for compute capability {gpu.capability}, {bucket}")
    return tables[max(fitting)][bucket]


@functools.cache
def _tables() -> dict[str, dict[tuple[int, int], dict[str, dict[str, int]]]]:
    read = json.loads(Path(__file__).with_name("launch_table.json").read_text())
    return {kernel: {_capability(name): buckets for name, buckets in by_gpu.items()} for kernel, by_gpu in read.items()}


def _capability(name: str) -> tuple[int, int]:
    major, minor = name.split(".")
    return int(major), int(minor)
