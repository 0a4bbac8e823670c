"""What Prometheus reads at /metrics, under the names and with the meanings that vLLM made common.

The engine reports by plain calls (`engine.observer`), which only add to numbers held here; Prometheus's own objects
are built when the page is asked for.
"""

import math
import re
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from engine.kv_policies.registry import POLICIES
from engine.observer import EngineObserver

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine
    from engine.observer import RequestRecord

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
PREFIX = "octavo:"

WINDOW = 10
"""Seconds over which throughput is averaged."""

_TTFT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.7, 1, 2, 5, 10, 20, 40, 80, 160)
_PER_TOKEN = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 20, 40, 80),
)
_PER_REQUEST = (0.01, 0.03, 0.1, 0.3, 0.5, 1, 1.5, 2, 3, 5, 10, 15, 20, 30, 60, 120, 300, 600, 1200, 3600)
_TOKENS = tuple(2**power for power in range(18))

HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("First token minus arrival.", _TTFT),
    "inter_token_latency_seconds": ("Time between two tokens of a request.", _PER_TOKEN),
    "request_time_per_output_token_seconds": ("(last - first token) / (tokens - 1), per request.", _PER_TOKEN),
    "e2e_request_latency_seconds": ("Last token minus arrival.", _PER_REQUEST),
    "request_queue_time_seconds": ("First scheduled minus arrival.", _PER_REQUEST),
    "request_prefill_time_seconds": ("First token minus first scheduled.", _PER_REQUEST),
    "request_decode_time_seconds": ("Last minus first token.", _PER_REQUEST),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a request.", _TOKENS),
    "iteration_tokens_total": ("Tokens computed in a step.", _TOKENS),
}
COUNTERS = {
    "prompt_tokens_total": "Prompt tokens processed.",
    "generation_tokens_total": "Tokens generated.",
    "prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits_total": "Prompt tokens found there.",
    "num_preemptions_total": "Times that a request had to give its blocks back, to go on or to start over later.",
}
LABELLED_COUNTERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "request_success_total": ("Requests ended.", "finished_reason", ("stop", "length", "abort", "timeout", "error")),
    "requests_rejected_total": ("Requests not let in.", "reason", ("queue", "queue_tokens", "not_ready")),
    "kv_blocks_swapped_total": ("KV blocks moved to the host tier and back.", "direction", ("out", "in")),
    "kv_tokens_evicted_total": ("Tokens whose KV a policy took.", "policy", tuple(POLICIES)),
}
"""Those with one more label: help line, the label's name and its values."""


class Histogram:
    """Counts of observations by upper bound (inclusive), and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Add one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it), cumulative, as Prometheus wants them."""
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))

    @property
    def sum(self) -> float:
        """All observations added up."""
        return self._sum


class Throughput:
    """Tokens per second over the last seconds, counted in one slot per second."""

    def __init__(self) -> None:
        self._slots: deque[list[int]] = deque(maxlen=WINDOW + 1)  # [second, prompt tokens, generated tokens]

    def add(self, prompt: int, generated: int, now: float) -> None:
        """Count tokens at ``now`` (seconds, monotonic)."""
        second = int(now)
        if not self._slots or self._slots[-1][0] != second:
            self._slots.append([second, 0, 0])
        self._slots[-1][1] += prompt
        self._slots[-1][2] += generated

    def rates(self, now: float) -> tuple[float, float]:
        """(prompt, generated) tokens per second, over the last ten whole seconds."""
        slots = [slot for slot in self._slots if int(now) - WINDOW <= slot[0] < int(now)]
        return sum(slot[1] for slot in slots) / WINDOW, sum(slot[2] for slot in slots) / WINDOW

    def seconds_to_begin(self, prompt_tokens: int, now: float) -> float:
        """How long so many queued prompt tokens take to begin, at the pace at which others did lately.

        0 where no pace is known, since nothing was computed; infinite where something was, but no prompt began.
        """
        slots = [slot for slot in self._slots if slot[0] >= int(now) - WINDOW]
        if not slots or not prompt_tokens:
            return 0.0
        begun = sum(slot[1] for slot in slots)
        # Since the first of them: work that began two seconds ago says nothing about the ten before.
        return prompt_tokens * max(now - slots[0][0], 1.0) / begun if begun else math.inf


class Metrics(EngineObserver, Collector):
    """The engine's observer, and a page of what it saw."""

    def __init__(self) -> None:
        self._histograms = {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._labelled = {name: dict.fromkeys(values, 0) for name, (_, _, values) in LABELLED_COUNTERS.items()}
        self._throughput = Throughput()
        self._engine: AsyncEngine | None = None
        self._model_name = ""
        self._vllm_names = False
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def attach(self, engine: "AsyncEngine", model_name: str, *, vllm_names: bool = False) -> None:
        """Say whose ``stats`` the gauges show, how the model is called, and whether to repeat all as `vllm:…`."""
        self._engine = engine
        self._model_name = model_name
        self._vllm_names = vllm_names

    def render(self) -> bytes:
        """The page."""
        page = generate_latest(self._registry)
        if self._vllm_names:
            page += re.sub(rb"^((?:# (?:HELP|TYPE) )?)octavo:", rb"\1vllm:", page, flags=re.MULTILINE)
        return page

    # What the server's admission calls.

    def on_rejection(self, reason: str) -> None:
        """A request was not let in; see `LABELLED_COUNTERS` for the reasons."""
        self._labelled["requests_rejected_total"][reason] += 1

    def seconds_to_begin(self, prompt_tokens: int) -> float:
        """See `Throughput.seconds_to_begin`."""
        return self._throughput.seconds_to_begin(prompt_tokens, time.monotonic())

    # What the engine calls; see engine.observer.

    def on_step(self, *, scheduled_tokens: int, num_running: int, num_waiting: int, kv_usage: float) -> None:
        """A step was scheduled. The gauges are read from the engine's stats instead, when the page is asked for."""
        self._histograms["iteration_tokens_total"].observe(scheduled_tokens)

    def on_preemption(self, count: int) -> None:
        """Requests were preempted."""
        self._counters["num_preemptions_total"] += count

    def on_swap(self, *, out: int, back: int) -> None:
        """Blocks moved."""
        self._labelled["kv_blocks_swapped_total"]["out"] += out
        self._labelled["kv_blocks_swapped_total"]["in"] += back

    def on_eviction(self, *, policy: str, tokens: int) -> None:
        """Tokens lost their KV."""
        evicted = self._labelled["kv_tokens_evicted_total"]
        evicted[policy] = evicted.get(policy, 0) + tokens  # programs may bring policies of their own

    def on_prefix_cache(self, *, queried_tokens: int, hit_tokens: int) -> None:
        """A prompt was looked up in the prefix cache."""
        self._counters["prefix_cache_queries_total"] += queried_tokens
        self._counters["prefix_cache_hits_total"] += hit_tokens

    def on_tokens(self, *, prompt: int, generated: int) -> None:
        """Tokens were processed."""
        self._counters["prompt_tokens_total"] += prompt
        self._counters["generation_tokens_total"] += generated
        self._throughput.add(prompt, generated, time.monotonic())

    def on_first_token(self, seconds_since_arrival: float) -> None:
        """A request got its first token."""
        self._histograms["time_to_first_token_seconds"].observe(seconds_since_arrival)

    def on_inter_token(self, seconds: float) -> None:
        """A request got another token."""
        self._histograms["inter_token_latency_seconds"].observe(seconds)

    def on_finish(self, record: "RequestRecord") -> None:
        """A continuation ended."""
        self._labelled["request_success_total"][record.finish_reason] += 1
        observed = {
            "e2e_request_latency_seconds": record.e2e_seconds,
            "request_queue_time_seconds": record.queue_seconds,
            "request_prefill_time_seconds": record.prefill_seconds,
            "request_decode_time_seconds": record.decode_seconds,
            "request_time_per_output_token_seconds": record.seconds_per_output_token,
            "request_prompt_tokens": record.prompt_tokens if record.index == 0 else None,  # one prompt, n answers
            "request_generation_tokens": record.generated_tokens,
        }
        for name, value in observed.items():
            if value is not None:
                self._histograms[name].observe(value)

    # What Prometheus's registry calls.

    def collect(self) -> Iterator[Metric]:
        """All families, with one label, ``model_name``."""
        labels = [self._model_name]
        yield from self._gauges(labels)
        for name, help_line in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, help_line, labels=["model_name"])
            counter.add_metric(labels, self._counters[name])
            yield counter
        for name, (help_line, label, _) in LABELLED_COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, help_line, labels=["model_name", label])
            for value, count in self._labelled[name].items():
                counter.add_metric([*labels, value], count)
            yield counter
        for name, (help_line, _) in HISTOGRAMS.items():
            histogram = self._histograms[name]
            family = HistogramMetricFamily(PREFIX + name, help_line, labels=["model_name"])
            family.add_metric(labels, histogram.buckets(), histogram.sum)
            yield family

    def _gauges(self, labels: list[str]) -> Iterator[Metric]:
        prompt, generated = self._throughput.rates(time.monotonic())
        values = {
            "prompt_throughput_toks_per_s": (f"Prompt tokens per second, last {WINDOW} s.", prompt),
            "generation_throughput_toks_per_s": (f"Generated tokens per second, last {WINDOW} s.", generated),
        }
        if self._engine is not None:
            stats = self._engine.stats()
            values["num_requests_running"] = ("Sequences in the batch.", stats.num_running)
            values["num_requests_waiting"] = (
                "Requests that have not begun, and preempted sequences.",
                stats.num_waiting,
            )
            values["num_queued_tokens"] = ("Prompt tokens of requests that have not begun.", stats.num_queued_tokens)
            values["kv_cache_usage_perc"] = ("Share of KV blocks in use, 0 to 1.", stats.kv_usage)
            values["host_kv_cache_usage_perc"] = ("The same of the host tier, 0 without one.", stats.host_kv_usage)
            info = GaugeMetricFamily(
                PREFIX + "cache_config_info",
                "Shape of the KV cache.",
                labels=["model_name", "block_size", "num_blocks"],
            )
            info.add_metric([*labels, str(stats.block_size), str(stats.num_blocks)], 1)
            yield info
            slots = GaugeMetricFamily(
                PREFIX + "kv_policy_slots", "KV slots that running sequences hold.", labels=["model_name", "policy"]
            )
            for policy, count in {**dict.fromkeys(POLICIES, 0), **self._engine.slots_by_policy()}.items():
                slots.add_metric([*labels, policy], count)
            yield slots
        for name, (help_line, value) in values.items():
            gauge = GaugeMetricFamily(PREFIX + name, help_line, labels=["model_name"])
            gauge.add_metric(labels, value)
            yield gauge
