"""`octavo bench step`: where the time of one model step goes, op by op, beside the floor that memory sets.

Each op is timed in place, within real steps of the real model; every layer has weights and KV of its own, so that
caches flatter nothing. The floor of an op is the bytes that it must read, over the bandwidth measured in the same run.
"""

import argparse
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench import flags

if TYPE_CHECKING:
    from engine.models.decoder import Decoder

OPS = ("linear", "paged_attention", "rms_norm", "rotary_embedding", "kv_write", "silu_and_mul")


@dataclass
class Timing:
    """One op's calls and seconds, summed over the timed steps."""

    calls: int = 0
    seconds: float = 0.0


@dataclass
class Profile:
    """Seconds by part of a step, the fastest step, and what each part must read at least, in bytes."""

    parts: dict[str, Timing] = field(default_factory=lambda: defaultdict(Timing))
    step_seconds: float = float("inf")
    timed_step_seconds: float = 0.0
    bytes_read: dict[str, int] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--model", default="embedded", help="what to load (default: embedded)")
    parser.add_argument("--dtype", default="auto", help="dtype of weights and activations (default: auto)")
    parser.add_argument("--kv-cache-dtype", default="auto", help="how KV is stored (default: as --dtype)")
    parser.add_argument("--batch", default="1,8,32", help="sequences in the step, a list (default: 1,8,32)")
    parser.add_argument(
        "--context", type=int, default=320, help="tokens that each holds in the KV cache (default: 320)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=1, help="tokens computed for each; 1 is decoding (default: 1)"
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")


def run(args: argparse.Namespace) -> int:
    """Print one table for each batch size. Raises ConfigError for settings that cannot work."""
    batches = flags.whole_numbers(args.batch, "--batch")
    flags.at_least(args, 1, "context", "new_tokens", "steps")
    from engine.config import EngineConfig, load
    from engine.kv_cache import pick_kv_format
    from engine.launch import load_model

    config = load(EngineConfig, {name: getattr(args, name) for name in ("model", "dtype", "kv_cache_dtype")})
    loaded = load_model(config)
    kv_format = pick_kv_format(config.kv_cache_dtype, loaded.decoder.config, loaded.dtype)
    bandwidth = read_bandwidth()
    print(f"{loaded.checkpoint.name}, {loaded.dtype}, {loaded.threads} threads; reads at {bandwidth / 1e9:.1f} GB/s")
    for batch in batches:
        profile = profile_step(loaded, kv_format, batch, args.context, args.new_tokens, args.steps)
        print(f"\n{batch} sequences × {args.new_tokens} new tokens at context {args.context}")
        print("\n".join(_table(profile, args.steps, bandwidth)))
    return 0


def read_bandwidth(nbytes: int = 1 << 29) -> float:
    """Bytes per second that all threads together read from memory: the best of five sums over more than any cache."""
    import torch

    data = torch.ones(nbytes // 8, dtype=torch.float64)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - began)
    return nbytes / best


def profile_step(loaded: Any, kv_format: Any, batch: int, context: int, new_tokens: int, steps: int) -> Profile:
    """Time ``steps`` steps as they are, then as many with every op timed."""
    import torch

    from engine.kv_cache import KVCache
    from engine.model_runner import ModelRunner
    from engine.sampler import SampleRow
    from engine.sampling_params import SamplingParams
    from scheduler.batch import ScheduledBatch, ScheduledSequence, Transfers

    config, size = loaded.decoder.config, 16
    blocks = -(-context // size)
    cache = KVCache(
        config,
        num_blocks=batch * blocks,
        block_size=size,
        dtype=loaded.dtype,
        device=loaded.device,
        kv_format=kv_format,
    )
    for part in (part for layer in cache.layers for part in (layer.key, layer.value)):
        values = torch.randn(*part.shape[:-1], config.head_dim, device=loaded.device)
        part.copy_(values if kv_format is None else kv_format.encode(values))
    tokens = array("i", range(1000, 1000 + new_tokens))
    items = tuple(
        ScheduledSequence(
            None,  # type: ignore[arg-type]
            context - new_tokens,
            tokens,
            array("i", range(index * blocks, (index + 1) * blocks)),
            1,
        )
        for index in range(batch)
    )
    step = ScheduledBatch(items, Transfers(), batch * new_tokens, 0)
    rows = [SampleRow(SamplingParams(temperature=0.0), 0, tokens, len(tokens), frozenset())] * batch
    runner = ModelRunner(loaded.decoder, cache)
    profile = Profile()
    for _ in range(steps + 3):
        began = time.perf_counter()
        runner.execute(step, rows)
        profile.step_seconds = min(profile.step_seconds, time.perf_counter() - began)
    with _timed_ops(profile.parts):
        for _ in range(steps):
            began = time.perf_counter()
            runner.execute(step, rows)
            profile.timed_step_seconds += time.perf_counter() - began
    profile.bytes_read = {
        "linear": weight_bytes_read(loaded.decoder),
        "paged_attention": batch * context * KVCache.block_bytes(config, 1, loaded.dtype, kv_format),
    }
    return profile


def weight_bytes_read(decoder: "Decoder") -> int:
    """Bytes of the weights that every step reads: all, but of an embedding that is not the head too a few rows."""
    return decoder.nbytes - (0 if decoder.config.tie_embeddings else decoder.embedding.nbytes)


@contextmanager
def _timed_ops(parts: dict[str, Timing]) -> Iterator[None]:
    """Within the block every call of `kernels.ops` adds to its part's time."""
    from kernels import ops

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        timing = parts[name]

        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            timing.seconds += time.perf_counter() - began
            timing.calls += 1
            return result

        return call

    originals = {name: getattr(ops, name) for name in OPS}
    try:
        for name, function in originals.items():
            setattr(ops, name, timed(name, function))
        yield
    finally:
        for name, function in originals.items():
            setattr(ops, name, function)


def _table(profile: Profile, steps: int, bandwidth: float) -> Sequence[str]:
    lines = [f"{'part':<18}{'calls':>7}{'µs/call':>10}{'ms/step':>9}{'share':>8}{'floor ms':>10}{'of floor':>10}"]
    rest = profile.timed_step_seconds / steps
    whole = rest
    for name, timing in sorted(profile.parts.items(), key=lambda part: -part[1].seconds):
        seconds = timing.seconds / steps
        rest -= seconds
        line = f"{name:<18}{timing.calls // steps:>7}{timing.seconds / timing.calls * 1e6:>10.1f}{seconds * 1e3:>9.2f}"
        line += f"{seconds / whole:>8.0%}"
        if name in profile.bytes_read:
            floor = profile.bytes_read[name] / bandwidth
            line += f"{floor * 1e3:>10.2f}{floor / seconds:>10.0%}"
        lines.append(line)
    floor = sum(profile.bytes_read.values()) / bandwidth
    lines.append(f"{'everything else':<18}{'':>7}{'':>10}{rest * 1e3:>9.2f}{rest / whole:>8.0%}")
    best = profile.step_seconds
    lines.append(
        f"{'step, untimed':<18}{'':>7}{'':>10}{best * 1e3:>9.2f}{'':>8}{floor * 1e3:>10.2f}{floor / best:>10.0%}"
    )
    return lines
