"""How much KV cache fits: from what the user asked for, or from what the machine has."""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv_cache import KVCache
from engine.models.config import ModelConfig

_SHARE_OF_FREE_CPU_MEMORY = 0.25
_SHARE_OF_FREE_GPU_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The KV cache's size, and the longest sequence that the engine accepts."""

    num_blocks: int
    max_model_len: int


def plan_memory(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> MemoryPlan:
    """Fit the KV cache and the context length to each other. Raises ConfigError if what was asked for cannot be."""
    if config.max_model_len is not None and config.max_model_len > model.max_position:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the {model.max_position} tokens "
            "that the model was trained for"
        )
    wanted_len = config.max_model_len or model.max_position
    block_bytes = KVCache.block_bytes(model, config.block_size, dtype)
    # More than this no set of running sequences can use.
    most = config.max_num_seqs * -(-wanted_len // config.block_size)
    if config.kv_cache_memory is not None:
        num_blocks = min(config.kv_cache_memory // block_bytes, most)
    else:
        num_blocks = min(_free_memory(device) // block_bytes, most)
    capacity = num_blocks * config.block_size
    if num_blocks < 1 or (config.max_model_len is not None and capacity < wanted_len):
        needed = -(-(config.max_model_len or 1) // config.block_size) * block_bytes
        raise ConfigError(
            f"the KV cache holds {capacity} tokens, fewer than --max-model-len {config.max_model_len or 1}; "
            f"--kv-cache-memory must be at least {needed / 2**20:.1f}MiB"
        )
    return MemoryPlan(num_blocks, min(wanted_len, capacity))


def _free_memory(device: torch.device) -> int:
    """Bytes that the KV cache may take where nobody said how many."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_FREE_GPU_MEMORY)
    return int(_free_cpu_memory() * _SHARE_OF_FREE_CPU_MEMORY)


def _free_cpu_memory() -> int:
    """What the system calls available, or what the container's limit leaves if that is less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return max(0, min(free, limit - int((group / "memory.current").read_text())))
    except (OSError, ValueError):  # no cgroup v2, or its limit is "max"
        return free
