"""Driving a loaded model directly, and an engine to its end."""

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.forward_batch import ForwardBatch
from engine.kv_cache import KVCache
from engine.launch import LoadedModel, assemble
from engine.observer import EngineObserver
from engine.outputs import Output, TokenLogprob
from engine.sampling_params import SamplingParams
from kernels.kv_format import KVFormat
from scheduler.batch import ScheduledSequence

GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


def all_logits(
    loaded: LoadedModel,
    tokens: Sequence[int],
    chunks: Sequence[int],
    block_size: int = 16,
    kv_format: KVFormat | None = None,
) -> Tensor:
    """Logits [len(tokens), vocab] of every position, computed in chunks of the given sizes over scattered blocks."""
    config = loaded.decoder.config
    num_blocks = -(-len(tokens) // block_size) + 3
    cache = KVCache(
        config,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=loaded.dtype,
        device=loaded.device,
        kv_format=kv_format,
    )
    table = array("i", torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist())
    rows, start = [], 0
    with torch.inference_mode():
        for size in chunks:
            item = ScheduledSequence(None, start, array("i", tokens[start : start + size]), table, 1)  # type: ignore[arg-type]
            batch = ForwardBatch.build([item], block_size, loaded.device)
            rows.append(loaded.decoder(replace(batch, output_rows=torch.arange(len(item.tokens))), cache))
            start += size
    return torch.cat(rows)


class PreemptionCount(EngineObserver):
    """Counts preemptions, and blocks that moved to the host and back."""

    preemptions = out = back = 0

    def on_preemption(self, count: int) -> None:
        """Add them."""
        self.preemptions += count

    def on_swap(self, *, out: int, back: int) -> None:
        """Add them."""
        self.out += out
        self.back += back


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Let the engine go on until the condition holds."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 — an engine has no event for each thing that a test may wait for
            await asyncio.sleep(0)


@dataclass
class Answer:
    """Everything that came out of one request, by continuation."""

    text: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    cached_tokens: int = 0
    evicted_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    embedding: Any = None

    def add(self, output: Output) -> None:
        """Append one output."""
        self.outputs.append(output)
        self.text[output.index] = self.text.get(output.index, "") + output.text
        self.tokens.setdefault(output.index, []).extend(output.token_ids)


async def ask(
    engine: AsyncEngine, prompt: Sequence[int], params: SamplingParams, request_id: str = "r", **options: Any
) -> Answer:
    """Submit one prompt and read its whole answer."""
    stream, answer = engine.submit(prompt, params, request_id=request_id, **options), Answer()
    async for output in stream:
        answer.add(output)
    answer.cached_tokens, answer.evicted_tokens = stream.cached_tokens, stream.evicted_tokens
    answer.prompt_logprobs, answer.embedding = stream.prompt_logprobs, stream.embedding
    return answer


async def ask_all(
    engine: AsyncEngine, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Answer]:
    """Submit all prompts at once, each with its own parameters or all with the same."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    return await asyncio.gather(
        *(ask(engine, prompt, own, f"r{i}") for i, (prompt, own) in enumerate(zip(prompts, each, strict=True)))
    )


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = GREEDY,
    observer: EngineObserver | None = None,
    **limits: Any,
) -> list[Answer]:
    """The answers of a fresh engine around ``loaded``, to all prompts at once."""

    async def run() -> list[Answer]:
        engine = assemble(EngineConfig(**{"kv_cache_memory": 1 << 27, **limits}), loaded, observer)
        await engine.start()
        answers = await ask_all(engine, prompts, params)
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.used_blocks) == (0, 0, 0)
        await engine.stop()
        return answers

    return asyncio.run(run())
