"""Sequences that decode with a long context behind them, which nobody computed: steps can be timed in seconds.

The scheduler decides the prompts' steps like any others, so block tables, drops and selections are those that a served
request would have; only the model does not compute them. What the KV cache holds instead is random. Every step from
there on is real: the scheduler decides it, the policies that are due select, the model computes, and its tokens are
appended.
"""

import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.step import weight_bytes_read
from engine.engine_info import EngineInfo
from engine.errors import ConfigError
from engine.kv_cache import KVCache
from engine.kv_compaction import compact
from engine.kv_policies.fit import fitted
from engine.kv_policies.policy import KVPolicy
from engine.launch import LoadedModel
from engine.model_runner import ModelRunner
from engine.request_checks import is_endless
from engine.sampler import SampleRow
from engine.sampling_params import SamplingParams
from kernels.ops import KVFormat
from scheduler.batch import ScheduledBatch, ScheduledSequence
from scheduler.config import SchedulerConfig
from scheduler.kv_budget import UNLIMITED, KVBudget, Selection, Window
from scheduler.request import Request, StopRule
from scheduler.scheduler import Scheduler

MIB = 2**20
WARM_STEPS = 3
"""Steps of decoding before those that are timed. In the first a policy may select that is due at the prompt's end."""

TOKEN = 7
"""What all prompts consist of: a step takes the same time whatever its tokens are."""
GREEDY = SamplingParams(temperature=0.0)
_CHUNK = 512
"""Prompt tokens in a step where all have budgets: with more, more blocks would be needed for windows."""
_ENDLESS = 2**30


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model, and what an engine around it can hold."""

    loaded: LoadedModel
    info: EngineInfo
    bandwidth: float
    """Bytes per second that are read from memory."""
    kv_format: KVFormat | None = None
    """Of the KV cache, where it is not the model's dtype."""

    def budget(self, policy: KVPolicy) -> KVBudget | None:
        """What a request under the policy may hold."""
        return fitted(policy.budget(), self.info.windows)

    def cache(self, num_blocks: int) -> KVCache:
        """A KV cache of random contents."""
        loaded, size = self.loaded, self.info.block_size
        cache = KVCache(
            loaded.decoder.config,
            num_blocks=num_blocks,
            block_size=size,
            dtype=loaded.dtype,
            device=loaded.device,
            kv_format=self.kv_format,
        )
        for part in cache.storage.kv.flatten(0, 1):
            values = torch.randn((*part.shape[:-1], loaded.decoder.config.head_dim))
            part.copy_(values if self.kv_format is None else self.kv_format.encode(values))
        cache.storage.mass.uniform_()
        return cache

    @property
    def block_bytes(self) -> int:
        """Of a block of the KV cache, over all layers."""
        return self.token_bytes * self.info.block_size

    @property
    def token_bytes(self) -> int:
        """Of a token's KV, over all layers."""
        return KVCache.block_bytes(self.loaded.decoder.config, 1, self.loaded.dtype, self.kv_format)

    @property
    def weight_bytes(self) -> int:
        """What every step reads."""
        return weight_bytes_read(self.loaded.decoder)

    def kv_bytes_read(self, batch: ScheduledBatch) -> int:
        """Bytes of the keys and values that a step's tokens attend to, each once.

        What counts attention, and what selects, reads more.
        """
        config = self.loaded.decoder.config
        tokens = sum(_seen(item, window) for item in batch.items for window in config.windows)
        return tokens * self.token_bytes // config.num_layers


def _seen(item: ScheduledSequence, window: int | None) -> int:
    """Slots that a layer with that window reads for a sequence."""
    slots, budget = item.start + len(item.tokens) - item.num_dropped, item.kv_budget
    if isinstance(budget, Window):
        slots = min(slots, budget.window + len(item.tokens) - 1 + budget.sinks)
    return slots if window is None else min(slots, window + len(item.tokens) - 1)


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that are to decode together, one for each policy, until their last step computes token ``context``."""

    policies: tuple[KVPolicy, ...]
    context: int
    steps: int

    @property
    def num_prompt(self) -> int:
        """Tokens of each prompt."""
        return self.context - self.steps - WARM_STEPS

    def budgets(self, subject: Subject) -> list[KVBudget | None]:
        """Each sequence's."""
        return [subject.budget(policy) for policy in self.policies]

    def chunk(self, subject: Subject) -> int:
        """Tokens in a step: all prompts of those that keep all, so that these end together, beside all that decode."""
        num_plain = sum(map(_grows, self.budgets(subject)))
        return (self.num_prompt * num_plain or min(self.num_prompt, _CHUNK)) + len(self.policies)

    def num_blocks(self, subject: Subject) -> int:
        """Blocks that they take at most."""
        size, chunk = subject.info.block_size, self.chunk(subject)
        plain = -(-(self.context + 1) // size)  # the last token that is sampled is none of the context's
        most = [UNLIMITED if one is None else one.max_blocks(chunk, size) for one in self.budgets(subject)]
        return sum(plain if one == UNLIMITED else one for one in most)

    def refusal(self, subject: Subject) -> str | None:
        """Why an engine could not serve them, in words; None if it could."""
        info = subject.info
        if self.context > info.max_model_len and not all(map(is_endless, self.policies)):
            return f"the model's context length is {info.max_model_len:,} tokens"
        if (blocks := self.num_blocks(subject)) > info.num_blocks:
            return f"it takes {blocks:,} blocks of KV cache, and there is room for {info.num_blocks:,}"
        return None


class Step(NamedTuple):
    """What a step took."""

    seconds: float
    kv_bytes: int


class Decoding:
    """A group that has its prompts behind it, about to decode in a cache that others may use in turn."""

    def __init__(self, subject: Subject, cache: KVCache, group: Group) -> None:
        self._subject, self._group = subject, group
        self._cache = cache
        self._runner = ModelRunner(subject.loaded.decoder, cache)
        self._scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=cache.num_blocks,
                block_size=cache.block_size,
                max_num_seqs=len(group.policies),
                max_num_batched_tokens=group.chunk(subject),
                prefix_caching=False,
            )
        )
        budgets = list(enumerate(group.budgets(subject)))
        # Those that hold a constant number of tokens may decode until the others are as far: it changes nothing.
        self._skip_prompts([one for one in budgets if not _grows(one[1])])
        self._skip_prompts([one for one in budgets if _grows(one[1])])
        for _ in range(WARM_STEPS):
            self.step()

    def _skip_prompts(self, budgets: Sequence[tuple[int, KVBudget | None]]) -> None:
        """Add requests, by their places in the group, and let the scheduler go on until all of them decode."""
        prompt = array("i", [TOKEN]) * self._group.num_prompt
        requests = []
        for index, budget in budgets:
            rule = StopRule(max_tokens=self._group.steps + WARM_STEPS + 1 if _grows(budget) else _ENDLESS)
            requests.append(Request(str(index), prompt, rule, kv_budget=budget))
            self._scheduler.add(requests[-1])
        while any(request.sequences[0].num_output_tokens == 0 for request in requests):
            batch = self._scheduler.schedule()
            policies = self._policies(batch)
            with torch.inference_mode():
                compact(self._cache, [(one, policies[one.sequence.request.request_id]) for one in batch.compactions])
            self._scheduler.update(batch, [[TOKEN] * item.num_samples for item in batch.items])

    def _policies(self, batch: ScheduledBatch) -> dict[str, KVPolicy]:
        """Of a step's requests, by their ids, which are their places in the group."""
        names = {item.sequence.request.request_id for item in batch.items}
        return {name: self._group.policies[int(name)] for name in names}

    def step(self) -> Step:
        """Decide and compute one token for each sequence."""
        began = time.perf_counter()
        batch = self._scheduler.schedule()
        rows = [_row(item) for item in batch.items]
        samples = self._runner.execute(batch, rows, self._policies(batch)).samples
        self._scheduler.update(batch, [[sample.token for sample in group] for group in samples])
        return Step(time.perf_counter() - began, self._subject.kv_bytes_read(batch))


def _grows(budget: KVBudget | None) -> bool:
    """Whether a sequence holds more and more while it decodes."""
    return budget is None or (isinstance(budget, Selection) and budget.slack is None)


def _row(item: ScheduledSequence) -> SampleRow:
    request = item.sequence.request
    return SampleRow(GREEDY, 0, item.sequence.tokens, request.num_prompt_tokens, frozenset())


def check_context(flag: str, context: int, steps: int) -> None:
    """Check that there is a prompt before the steps. Raises ConfigError."""
    if context <= steps + WARM_STEPS:
        raise ConfigError(f"{flag} must be more than the {steps + WARM_STEPS} steps of a measurement, not {context}")


def whole_cycles(steps: int, policies: Iterable[KVPolicy]) -> int:
    """At least so many steps, in which the policy that selects least often does so a whole number of times, twice or
    more: between selections steps are not alike, and a mean is to count each kind as often as it occurs.
    """
    slack = max((budget.slack or 1 for p in policies if isinstance(budget := p.budget(), Selection)), default=1)
    return max(-(-steps // slack), 2) * slack
