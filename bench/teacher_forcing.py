"""A text through the engine's own steps, each token's likelihood taken on the way: what is measured is what is served.

A text is a request: the scheduler cuts its prompt into chunks, drops blocks and says when a policy selects, in a pool
that is no larger than the budget allows, and a `ModelRunner` computes the steps. What comes after the prompt is forced,
as if it had been sampled.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine_info import EngineInfo
from engine.forward_batch import ForwardBatch
from engine.kv_cache import KVCache, pick_kv_format
from engine.kv_policies.fit import fitted
from engine.kv_policies.policy import KVPolicy
from engine.launch import LoadedModel, engine_info, load_model
from engine.memory import plan_memory
from engine.model_runner import ModelRunner
from engine.models.decoder import Decoder
from kernels.ops import KVFormat
from scheduler.batch import ScheduledBatch
from scheduler.config import SchedulerConfig
from scheduler.kv_budget import UNLIMITED, KVBudget, Window
from scheduler.request import Request, StopRule
from scheduler.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """How texts are cut into steps."""

    chunk: int = 512
    """Tokens computed in a step, at most."""
    prompt_len: int | None = None
    """Tokens of a text that come at once, in chunks; the others one by one. None: all, if that is the same, else those
    that are not scored."""
    texts_at_a_time: int = 8
    block_size: int = 16
    kv_format: KVFormat | None = None
    """How KV is stored, where not in the model's dtype."""

    @classmethod
    def of(cls, args: argparse.Namespace, config: EngineConfig, loaded: LoadedModel) -> "Steps":
        """As a command's flags have them. Raises ConfigError."""
        kv_format = pick_kv_format(config.kv_cache_dtype, loaded.decoder.config, loaded.dtype)
        return cls(chunk=args.chunk, prompt_len=args.prompt_len, block_size=config.block_size, kv_format=kv_format)


@dataclass(frozen=True, slots=True)
class Scores:
    """What was found of N texts with L tokens each."""

    nll: Tensor
    """[N, L] float32: −ln p(token | all tokens before it); NaN where it was not wanted."""
    blocks: list[tuple[int, int]]
    """Per step: the tokens computed until its end, of all texts, and the KV blocks held meanwhile."""


def load(config: EngineConfig) -> tuple[LoadedModel, EngineInfo]:
    """The model, and what an engine would tell of it. Raises OctavoError."""
    loaded = load_model(config)
    plan = plan_memory(config, loaded.decoder.config, loaded.dtype, loaded.device)
    return loaded, engine_info(config, loaded, plan)


class Witness:
    """Stands before a decoder in a `ModelRunner`, and keeps the logits of the rows that one wants to see."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.rows: Sequence[int] = ()
        """Of the step to come: indices into its tokens."""
        self.logits = torch.empty(0)
        """Of the last step: [rows, vocab]."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def hidden_states(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """The decoder's step. Nothing is handed on, for nothing is sampled."""
        rows = torch.tensor(self.rows, dtype=torch.int64, device=batch.tokens.device)
        self.logits = self._decoder(replace(batch, output_rows=rows), cache)
        return self.logits[:0]


def by_position(policy: KVPolicy) -> bool:
    """Whether what a token sees depends on its position alone, and not on where the prompt ends."""
    budget = policy.budget()
    return budget is None or isinstance(budget, Window)


def score(
    loaded: LoadedModel,
    policy: KVPolicy,
    texts: Sequence[Sequence[int]],
    steps: Steps,
    *,
    skip: int = 0,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> Scores:
    """The likelihood of texts of equal length, of at least 2 tokens, under a policy.

    A text's first token and the ``skip`` after it are not scored. ``on_tokens`` is told of each step's tokens.
    """
    length = len(texts[0])
    budget = fitted(policy.budget(), loaded.decoder.config.windows)
    scheduler, runner, witness = _engine(loaded, budget, length, len(texts), steps)
    for index, text in enumerate(texts):
        scheduler.add(_request(str(index), text, policy, budget, steps, skip))
    scores = Scores(torch.full((len(texts), length), torch.nan), [])
    done = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        if batch.num_preempted or not batch:
            raise RuntimeError(f"the policy {policy.name!r} takes more blocks than its budget says")
        places, targets = _wanted(batch, texts, skip, witness)
        runner.execute(batch, [], {str(index): policy for index in range(len(texts))})
        if places:
            wanted = torch.tensor(targets, device=loaded.device)
            losses = torch.nn.functional.cross_entropy(witness.logits.float(), wanted, reduction="none")
            scores.nll[tuple(torch.tensor(places).T)] = losses.cpu()
        done += batch.num_tokens
        scores.blocks.append((done, scheduler.pool.num_used))
        scheduler.update(batch, _forced(batch, texts))
        on_tokens(batch.num_tokens)
    return scores


def _engine(
    loaded: LoadedModel, budget: KVBudget | None, length: int, num_texts: int, steps: Steps
) -> tuple[Scheduler, ModelRunner, Witness]:
    """A scheduler and a runner whose pool holds what the budget says, and nothing more."""
    config, size = loaded.decoder.config, steps.block_size
    blocks = -(-length // size)
    if budget is not None:
        most = budget.max_blocks(min(length, steps.chunk), size)
        blocks = min(blocks, most) if isinstance(budget, Window) or most == UNLIMITED else most
    places = min(num_texts, steps.texts_at_a_time)
    limits = SchedulerConfig(
        num_blocks=places * blocks,
        block_size=size,
        max_num_seqs=places,
        max_num_batched_tokens=steps.chunk,
        prefix_caching=False,  # what is found in a cache has no logits
    )
    cache = KVCache(
        config,
        num_blocks=limits.num_blocks,
        block_size=size,
        dtype=loaded.dtype,
        device=loaded.device,
        kv_format=steps.kv_format,
    )
    witness = Witness(loaded.decoder)
    return Scheduler(limits), ModelRunner(cast(Decoder, witness), cache), witness


def _request(
    name: str, text: Sequence[int], policy: KVPolicy, budget: KVBudget | None, steps: Steps, skip: int
) -> Request:
    """The text as a prompt and what is to follow it. The last token is only predicted: it has no KV."""
    prompt_len = steps.prompt_len
    if prompt_len is None:
        prompt_len = len(text) if by_position(policy) else max(skip, 1)
    prompt = text[: min(prompt_len, len(text) - 1)]
    return Request(name, prompt, StopRule(max_tokens=len(text) - len(prompt)), kv_budget=budget)


def _wanted(
    batch: ScheduledBatch, texts: Sequence[Sequence[int]], skip: int, witness: Witness
) -> tuple[list[tuple[int, int]], list[int]]:
    """Which tokens the step predicts that are wanted: their (text, position), and their ids."""
    places, rows, row = [], [], 0
    for item in batch.items:
        text = int(item.sequence.request.request_id)
        for position in range(item.start + 1, item.start + 1 + len(item.tokens)):
            if position > skip:
                places.append((text, position))
                rows.append(row)
            row += 1
    witness.rows = rows
    return places, [texts[text][position] for text, position in places]


def _forced(batch: ScheduledBatch, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What the text says where something would be sampled."""
    return [
        [texts[int(item.sequence.request.request_id)][item.start + len(item.tokens)]] if item.num_samples else []
        for item in batch.items
    ]
