"""From a configuration to an engine that is ready to start: open, check, load, fit the KV cache."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tqdm import tqdm

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.engine_info import EngineInfo
from engine.errors import ConfigError
from engine.host import available_cores, keep_freed_memory
from engine.kv_cache import KVCache
from engine.memory import MemoryPlan, held_slots, plan_memory
from engine.model_runner import ModelRunner
from engine.models.decoder import Decoder
from engine.models.loading import load_decoder, num_bytes
from engine.models.registry import model_config
from engine.observer import EngineObserver
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from kernels import ops
from scheduler.batching import Batching
from scheduler.config import SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.trace import TracedScheduler
from scheduler.waiting_queue import Order

_SAMPLING_DEFAULTS: Final[Mapping[str, tuple[Any, float, float]]] = {
    "temperature": (int | float, 0, 100),
    "top_k": (int, 0, 2**31 - 1),
    "top_p": (int | float, 1e-6, 1),
    "min_p": (int | float, 0, 1),
    "repetition_penalty": (int | float, 0.01, 100),
}
"""The type and the range (both ends included) of what a generation_config.json may recommend."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint's weights in memory, and what they were read from."""

    checkpoint: Checkpoint
    decoder: Decoder
    dtype: torch.dtype
    device: torch.device
    threads: int
    load_seconds: float


def load_engine(config: EngineConfig, observer: EngineObserver | None = None) -> AsyncEngine:
    """Load the model and size its memory; takes seconds. Raises OctavoError, in one line, for what cannot work.

    The weights are loaded in a thread that then ends, and its pool of OpenMP threads with it. Were the pool kept beside
    the model thread's own, OpenMP would count more threads than cores, and put its threads to sleep after each parallel
    region instead of letting them spin: a decode step of SmolLM2 takes 18 ms then instead of 11.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="octavo-load") as loader:
        loaded = loader.submit(load_model, config).result()
    return assemble(config, loaded, observer)


def load_model(config: EngineConfig) -> LoadedModel:
    """Open the checkpoint and load its weights."""
    began = time.perf_counter()
    device = pick_device(config.device)
    threads = config.threads or available_cores()
    torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_freed_memory()
        ops.load(config.cache_dir)
    checkpoint = open_checkpoint(config.model, revision=config.revision)
    model = model_config(checkpoint.config)
    dtype = pick_dtype(config.dtype, device)
    # disable=None shows the bar in a terminal only.
    with tqdm(
        total=num_bytes(model, dtype), desc="loading weights", unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:
        decoder = load_decoder(
            model,
            checkpoint.tensors,
            dtype=dtype,
            device=device,
            progress=bar.update,
            keep_quantized=keep_quantized(config, device),
        )
    return LoadedModel(checkpoint, decoder, dtype, device, threads, time.perf_counter() - began)


def assemble(config: EngineConfig, loaded: LoadedModel, observer: EngineObserver | None = None) -> AsyncEngine:
    """An engine around a loaded model: its KV cache, its scheduler, its limits. Raises ConfigError."""
    model, dtype = loaded.decoder.config, loaded.dtype
    plan = plan_memory(config, model, dtype, loaded.device)
    try:
        cache = KVCache(
            model,
            num_blocks=plan.num_blocks,
            num_host_blocks=plan.num_host_blocks,
            block_size=config.block_size,
            dtype=dtype,
            device=loaded.device,
            kv_format=plan.kv_format,
        )
    except RuntimeError as error:  # torch's word for "out of memory"
        raise ConfigError(
            f"a KV cache of {plan.num_blocks} blocks cannot be allocated: {error}".splitlines()[0]
        ) from None
    scheduler = _scheduler(scheduler_config(config, plan), config.trace)
    return AsyncEngine(
        config,
        engine_info(config, loaded, plan),
        loaded.checkpoint.tokenizer,
        scheduler,
        ModelRunner(loaded.decoder, cache),
        default_sampling=default_sampling(loaded.checkpoint.generation_config),
        observer=observer,
    )


def scheduler_config(config: EngineConfig, plan: MemoryPlan) -> SchedulerConfig:
    """The scheduler's limits and rules. Raises ConfigError for those that contradict each other."""
    try:
        return SchedulerConfig(
            num_blocks=plan.num_blocks,
            num_host_blocks=plan.num_host_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefix_caching=config.prefix_caching,
            preemption=config.preemption,
            batching=Batching(mode=config.batching, size=config.batch_size, delay=config.batch_delay),
            order=Order(policy=config.scheduling, ageing=config.ageing),
            queue_timeout=config.queue_timeout,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _scheduler(config: SchedulerConfig, trace: Path | None) -> Scheduler:
    if trace is None:
        return Scheduler(config)
    try:
        return TracedScheduler(config, trace)
    except OSError as error:
        raise ConfigError(f"--trace {trace}: cannot be written: {error.strerror}") from None


def engine_info(config: EngineConfig, loaded: LoadedModel, plan: MemoryPlan) -> EngineInfo:
    """What an engine around a loaded model tells of itself."""
    model = loaded.decoder.config
    return EngineInfo(
        model_name=loaded.checkpoint.name,
        architecture=model.architecture,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device),
        threads=loaded.threads,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        max_model_len=plan.max_model_len,
        weight_bytes=loaded.decoder.nbytes,
        weight_bits=loaded.decoder.quantized_bits,
        num_blocks=plan.num_blocks,
        block_size=config.block_size,
        kv_bytes=plan.num_blocks * KVCache.block_bytes(model, config.block_size, loaded.dtype, plan.kv_format),
        kv_format=None if plan.kv_format is None else plan.kv_format.name,
        load_seconds=loaded.load_seconds,
        position_dependent_rotation=model.rope.rope_type == "dynamic",
        windows=model.windows,
        full_length_slots=held_slots(config, model, plan.max_model_len),
    )


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` takes the GPU where there is one. Raises ConfigError if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; `auto` takes bfloat16 where the device multiplies it natively, else float32.

    On CPUs that is AVX-512-BF16 or AMX: half the bytes of float32 and, measured on SmolLM2-135M with one row, 6 ms
    instead of 35 ms a step (docs/performance.md). Without those instructions bfloat16 is emulated, and slower.
    """
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def keep_quantized(config: EngineConfig, device: torch.device) -> bool:
    """Whether matrices stay in the 4 or 8 bits of their file: on CPUs, unless float32 is asked for by name."""
    return config.quantization == "auto" and config.dtype != "float32" and device.type == "cpu"


def default_sampling(generation_config: Mapping[str, Any]) -> dict[str, float]:
    """What a generation_config.json recommends, where it samples at all; what makes no sense is ignored."""
    if not generation_config.get("do_sample", False):
        return {}
    return {
        name: value
        for name, (kind, low, high) in _SAMPLING_DEFAULTS.items()
        if isinstance(value := generation_config.get(name), kind)
        and not isinstance(value, bool)
        and low <= value <= high
    }
