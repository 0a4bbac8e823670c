"""Computes a scheduled step: lays the batch out, runs the model over it, samples."""

from collections.abc import Mapping, Sequence
from itertools import islice
from types import MappingProxyType

import torch

from engine.forward_batch import ForwardBatch
from engine.kv_cache import KVCache
from engine.kv_compaction import compact
from engine.kv_policies.policy import KVPolicy
from engine.models.decoder import Decoder
from engine.sampler import Sample, SampleRow, sample
from engine.token_masks import TokenMasks
from scheduler.batch import ScheduledBatch


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
    ) -> list[list[Sample]]:
        """Compute one step. ``rows`` holds each item's ``num_samples`` rows in turn; so does, by item, the answer.

        ``policies`` by request id are those of the batch's requests with a `Selection` as their budget.
        """
        self.cache.transfer(batch.transfers)
        compact(self.cache, [(one, policies[one.sequence.request.request_id]) for one in batch.compactions])
        if not batch.items:
            return []
        masks = self._masks.begin([row.matcher for row in rows])
        forward = ForwardBatch.build(batch.items, self.cache.block_size, self._device, policies)
        logits = self.model(forward, self.cache)
        if len(rows) > len(logits):  # a prompt forks: each continuation draws from the same logits
            repeats = torch.tensor([item.num_samples for item in batch.items if item.num_samples > 0])
            logits = logits.repeat_interleave(repeats.to(self._device), dim=0)
        samples = sample(logits, rows, masks.result(self._device)) if rows else []
        for row, one in zip(rows, samples, strict=True):
            if row.matcher is not None:
                row.matcher.accept(one.token)
        rest = iter(samples)
        return [list(islice(rest, item.num_samples)) for item in batch.items]
