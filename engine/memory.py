"""How much KV cache fits: from what the user asked for, or from what the machine has."""

from dataclasses import dataclass

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.host import available_memory
from engine.kv_cache import KVCache, pick_kv_format
from engine.kv_policies.fit import fitted
from engine.models.config import ModelConfig
from kernels.ops import KVFormat

_SHARE_OF_FREE_CPU_MEMORY = 0.25
_SHARE_OF_FREE_GPU_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The KV cache's size and format, its host tier's size, and the longest sequence that the engine accepts."""

    num_blocks: int
    num_host_blocks: int
    max_model_len: int
    kv_format: KVFormat | None = None
    """Where it is not the model's dtype."""


def plan_memory(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> MemoryPlan:
    """Fit the KV cache and the context length to each other. Raises ConfigError if what was asked for cannot be."""
    if config.max_model_len is not None and config.max_model_len > model.max_position:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the {model.max_position} tokens "
            "that the model was trained for"
        )
    wanted_len = config.max_model_len or model.max_position
    kv_format = pick_kv_format(config.kv_cache_dtype, model, dtype)
    block_bytes = KVCache.block_bytes(model, config.block_size, dtype, kv_format)
    if config.kv_cache_memory is not None:
        num_blocks = config.kv_cache_memory // block_bytes
    else:
        # No more than all running sequences at full length can use, and as much again for cached prefixes.
        most = 2 * config.max_num_seqs * -(-wanted_len // config.block_size)
        num_blocks = min(_free_memory(device) // block_bytes, most)
    longest = held_slots(config, model, wanted_len)
    capacity = num_blocks * config.block_size
    if capacity < (longest if config.max_model_len is not None else 1):
        wanted = "one block" if config.max_model_len is None else f"--max-model-len {config.max_model_len}"
        needed = -(-(longest if config.max_model_len is not None else 1) // config.block_size) * block_bytes
        raise ConfigError(
            f"the KV cache has room for {capacity} tokens, too few for {wanted}: "
            f"--kv-cache-memory must be at least {-(-needed // 1024)}KiB"
        )
    max_model_len = wanted_len if capacity >= longest else capacity
    return MemoryPlan(num_blocks, _host_blocks(config, block_bytes), max_model_len, kv_format)


def held_slots(config: EngineConfig, model: ModelConfig, length: int) -> int:
    """KV slots that a plain sequence of ``length`` tokens holds at most: fewer where all layers have windows."""
    budget = fitted(None, model.windows)
    if budget is None:
        return length
    return min(
        length, budget.max_blocks(min(length, config.max_num_batched_tokens), config.block_size) * config.block_size
    )


def _host_blocks(config: EngineConfig, block_bytes: int) -> int:
    if config.swap_memory is None:
        if config.preemption == "swap":
            raise ConfigError("--preemption swap needs --swap-memory")
        return 0
    if config.swap_memory < block_bytes:
        raise ConfigError(f"--swap-memory has no room for one block: it must be at least {-(-block_bytes // 1024)}KiB")
    return config.swap_memory // block_bytes


def _free_memory(device: torch.device) -> int:
    """Bytes that the KV cache may take where nobody said how many."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_FREE_GPU_MEMORY)
    return int(available_memory() * _SHARE_OF_FREE_CPU_MEMORY)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the device or on the host."""
    # torch says so on CPUs by a plain RuntimeError
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
