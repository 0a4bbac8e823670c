"""Computes a scheduled step: lays the batch out, runs the model over it, samples."""

from collections.abc import Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

import torch

from engine.forward_batch import ForwardBatch
from engine.kv_cache import KVCache
from engine.kv_compaction import compact
from engine.kv_policies.policy import KVPolicy
from engine.models.decoder import Decoder
from engine.prompt_outputs import PromptOutput, read_prompts
from engine.sampler import Sample, SampleRow, sample
from engine.sampling_params import SamplingParams
from engine.token_masks import TokenMasks
from scheduler.batch import ScheduledBatch


class StepResult(NamedTuple):
    """What a step gave."""

    samples: list[list[Sample]]
    """By item, its ``num_samples``."""
    prompts: Mapping[int, PromptOutput] = MappingProxyType({})
    """By item, where positions of its prompt were observed: what those gave."""


class ModelRunner:
    """Owns the model and its KV cache; one thread at a time calls it."""

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self._device = model.embedding.device
        self._masks = TokenMasks(model.config.vocab_size)

    @torch.inference_mode()
    def execute(
        self,
        batch: ScheduledBatch,
        rows: Sequence[SampleRow],
        policies: Mapping[str, KVPolicy] = MappingProxyType({}),
        observed: Mapping[str, SamplingParams] = MappingProxyType({}),
    ) -> StepResult:
        """Compute one step. ``rows`` holds each item's ``num_samples`` rows in turn.

        ``policies`` by request id are those of the batch's requests with a `Selection` as their budget;
        ``observed`` are the parameters of those of whose prompts positions are observed.
        """
        self.cache.transfer(batch.transfers)
        compact(self.cache, [(one, policies[one.sequence.request.request_id]) for one in batch.compactions])
        if not batch.items:
            return StepResult([])
        masks = self._masks.begin([row.matcher for row in rows])
        forward = ForwardBatch.build(batch.items, self.cache.block_size, self._device, policies)
        states = self.model.hidden_states(forward, self.cache)
        prompts: Mapping[int, PromptOutput] = {}
        if forward.num_observed:
            prompts = read_prompts(states[: forward.num_observed], self.model.head, batch.items, observed)
            states = states[forward.num_observed :]
        if not rows:
            return StepResult([[] for _ in batch.items], prompts)
        logits = self.model.head(states)
        if len(rows) > len(logits):  # a prompt forks: each continuation draws from the same logits
            repeats = torch.tensor([item.num_samples for item in batch.items if item.num_samples > 0])
            logits = logits.repeat_interleave(repeats.to(self._device), dim=0)
        samples = sample(logits, rows, masks.result(self._device))
        for row, one in zip(rows, samples, strict=True):
            if row.matcher is not None:
                row.matcher.accept(one.token)
        rest = iter(samples)
        return StepResult([list(islice(rest, item.num_samples)) for item in batch.items], prompts)
