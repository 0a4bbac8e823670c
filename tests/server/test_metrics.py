"""The page that Prometheus reads."""

import math
import statistics
import time
from collections.abc import Callable
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.memory import MemoryPlan
from engine.observer import EngineObserver, RequestRecord
from scheduler.request import FinishReason
from server.config import ServerConfig
from server.metrics import HISTOGRAMS, Histogram, Metrics, Throughput
from tests.server.conftest import Live, wait_until
from tests.server.fakes import FakeEngine
from tests.server.scripted import staged

GAUGES = {
    "num_requests_running",
    "num_requests_waiting",
    "num_queued_tokens",
    "kv_cache_usage_perc",
    "host_kv_cache_usage_perc",
    "cache_config_info",
    "kv_policy_slots",
    "generation_throughput_toks_per_s",
    "prompt_throughput_toks_per_s",
}
COUNTERS = {
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "request_success_total",
    "requests_rejected_total",
    "kv_blocks_swapped_total",
    "kv_tokens_evicted_total",
}
HISTOGRAM_NAMES = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
}


def samples(page: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All samples by name and labels, without model_name, which must be there."""
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "fake"
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics()
    metrics.attach(FakeEngine(waiting=3, queued_tokens=70), "fake")
    return metrics


def test_it_is_the_engines_observer(metrics: Metrics) -> None:
    observer: EngineObserver = metrics
    observer.on_preemption(2)
    assert samples(metrics.render())["octavo:num_preemptions_total", frozenset()] == 2


def test_every_name_is_there_before_anything_happened(metrics: Metrics) -> None:
    names = {name for name, _ in samples(metrics.render())}
    expected = GAUGES | COUNTERS | {f"{name}_{part}" for name in HISTOGRAM_NAMES for part in ("bucket", "sum", "count")}
    assert names == {f"octavo:{name}" for name in expected}


def test_gauges_show_the_engines_state(metrics: Metrics) -> None:
    found = samples(metrics.render())
    assert found["octavo:num_requests_waiting", frozenset()] == 3
    assert found["octavo:num_queued_tokens", frozenset()] == 70
    assert found["octavo:kv_cache_usage_perc", frozenset()] == 0.25
    assert found["octavo:host_kv_cache_usage_perc", frozenset()] == 0.5
    assert found["octavo:kv_policy_slots", frozenset({("policy", "window")})] == 12
    assert found["octavo:kv_policy_slots", frozenset({("policy", "full")})] == 0
    assert found["octavo:cache_config_info", frozenset({("block_size", "16"), ("num_blocks", "16")})] == 1


def test_a_finished_request_is_counted_and_timed(metrics: Metrics) -> None:
    metrics.on_tokens(prompt=10, generated=0)
    metrics.on_tokens(prompt=0, generated=5)
    metrics.on_prefix_cache(queried_tokens=10, hit_tokens=4)
    metrics.on_first_token(0.3)
    metrics.on_inter_token(0.002)
    metrics.on_step(scheduled_tokens=7, num_running=1, num_waiting=0, kv_usage=0.1)
    metrics.on_finish(
        RequestRecord(
            index=0,
            finish_reason="length",
            prompt_tokens=10,
            generated_tokens=5,
            e2e_seconds=0.7,
            queue_seconds=0.1,
            prefill_seconds=0.2,
            decode_seconds=0.4,
        )
    )
    found = samples(metrics.render())
    none: frozenset[tuple[str, str]] = frozenset()
    assert found["octavo:prompt_tokens_total", none] == 10
    assert found["octavo:generation_tokens_total", none] == 5
    assert found["octavo:prefix_cache_hits_total", none] == 4
    assert found["octavo:request_success_total", frozenset({("finished_reason", "length")})] == 1
    assert found["octavo:request_time_per_output_token_seconds_sum", none] == pytest.approx(0.1)
    assert found["octavo:request_prompt_tokens_sum", none] == 10
    for name in HISTOGRAM_NAMES:
        assert found[f"octavo:{name}_count", none] == 1
    assert found["octavo:inter_token_latency_seconds_bucket", frozenset({("le", "0.002")})] == 1
    assert found["octavo:inter_token_latency_seconds_bucket", frozenset({("le", "0.001")})] == 0


def test_a_request_that_never_ran_has_no_times(metrics: Metrics) -> None:
    metrics.on_finish(
        RequestRecord(index=0, finish_reason="abort", prompt_tokens=1, generated_tokens=0, e2e_seconds=1.0)
    )
    found = samples(metrics.render())
    assert found["octavo:request_success_total", frozenset({("finished_reason", "abort")})] == 1
    assert found["octavo:request_queue_time_seconds_count", frozenset()] == 0
    assert found["octavo:request_time_per_output_token_seconds_count", frozenset()] == 0


@pytest.mark.parametrize("reason", get_args(FinishReason))
def test_every_way_to_end_is_counted(metrics: Metrics, reason: FinishReason) -> None:
    metrics.on_finish(
        RequestRecord(index=0, finish_reason=reason, prompt_tokens=1, generated_tokens=0, e2e_seconds=1.0)
    )
    assert samples(metrics.render())["octavo:request_success_total", frozenset({("finished_reason", reason)})] == 1


def test_moved_blocks_are_counted_by_direction(metrics: Metrics) -> None:
    metrics.on_swap(out=3, back=0)
    metrics.on_swap(out=1, back=2)
    found = samples(metrics.render())
    assert found["octavo:kv_blocks_swapped_total", frozenset({("direction", "out")})] == 4
    assert found["octavo:kv_blocks_swapped_total", frozenset({("direction", "in")})] == 2


def test_evicted_tokens_are_counted_under_any_policys_name(metrics: Metrics) -> None:
    metrics.on_eviction(policy="window", tokens=3)
    metrics.on_eviction(policy="my own", tokens=2)
    metrics.on_eviction(policy="my own", tokens=2)
    found = samples(metrics.render())
    counts = {"full": 0, "window": 3, "my own": 4}
    for policy, count in counts.items():
        assert found["octavo:kv_tokens_evicted_total", frozenset({("policy", policy)})] == count


def test_blocks_that_a_scheduler_swaps_show_on_the_page() -> None:
    plan = MemoryPlan(num_blocks=8, num_host_blocks=16, max_model_len=128)
    with staged(plan=plan, max_num_seqs=2) as stage:

        def value(name: str, **labels: str) -> float:
            return samples(stage.live.http.get("/metrics").content)[f"octavo:{name}", frozenset(labels.items())]

        stage.model.pace = 0.002
        stage.send(prompt=["a0", "b0"], max_tokens=100)
        assert wait_until(lambda: value("host_kv_cache_usage_perc") > 0)
        assert stage.drained()
        moved = [value("kv_blocks_swapped_total", direction=direction) for direction in ("out", "in")]
        assert moved[0] == moved[1] > 0
        assert value("host_kv_cache_usage_perc") == 0


@pytest.mark.parametrize("caching", [True, False])
def test_prefix_hits_are_a_share_of_what_was_looked_up(caching: bool) -> None:
    with staged(prefix_caching=caching, max_num_seqs=4) as stage:
        usages = [stage.post(prompt=["p" * 40, "p" * 20], n=2).json()["usage"] for _ in range(2)]
        page = samples(stage.live.http.get("/metrics").content)
        queried, hit = (page[f"octavo:prefix_cache_{name}_total", frozenset()] for name in ("queries", "hits"))
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached == ([16, 48] if caching else [0, 0]), "the second prompt finds the first one's block"
    assert hit == sum(cached)
    assert queried == (sum(usage["prompt_tokens"] for usage in usages) if caching else 0)


def test_a_prompt_is_counted_once_however_many_answers_it_has(metrics: Metrics) -> None:
    for index in range(3):
        record = RequestRecord(index=index, finish_reason="stop", prompt_tokens=9, generated_tokens=2, e2e_seconds=1.0)
        metrics.on_finish(record)
    found = samples(metrics.render())
    assert found["octavo:request_prompt_tokens_sum", frozenset()] == 9
    assert found["octavo:request_prompt_tokens_count", frozenset()] == 1
    assert found["octavo:request_generation_tokens_count", frozenset()] == 3


def test_buckets_begin_at_a_millisecond_and_first_tokens_may_take_160_seconds() -> None:
    for name in ("time_to_first_token", "inter_token_latency", "request_time_per_output_token"):
        assert HISTOGRAMS[f"{name}_seconds"][1][0] == 0.001
    assert HISTOGRAMS["time_to_first_token_seconds"][1][-1] == 160
    for _, bounds in HISTOGRAMS.values():
        assert list(bounds) == sorted(set(bounds))


def test_a_histograms_buckets_are_cumulative_and_inclusive() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 99):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
    assert histogram.sum == 104


def test_throughput_is_an_average_over_ten_seconds() -> None:
    throughput = Throughput()
    for second in range(100, 130):
        throughput.add(prompt=5, generated=20, now=second + 0.5)
    assert throughput.rates(130.0) == (5, 20)
    assert throughput.rates(135.0) == (2.5, 10)
    assert throughput.rates(150.0) == (0, 0)


def test_a_queue_begins_at_the_pace_of_the_last_seconds() -> None:
    throughput = Throughput()
    assert throughput.seconds_to_begin(500, 100.0) == 0, "no pace is known yet"
    throughput.add(prompt=100, generated=0, now=100.2)
    assert throughput.seconds_to_begin(500, 100.4) == 5, "a pace is taken over a second at least"
    for second in range(101, 130):
        throughput.add(prompt=100, generated=20, now=second + 0.5)
    assert throughput.seconds_to_begin(500, 130.0) == 5
    assert throughput.seconds_to_begin(0, 130.0) == 0
    assert throughput.seconds_to_begin(500, 150.0) == 0, "that was long ago"


def test_a_queue_of_which_nothing_begins_takes_for_ever() -> None:
    throughput = Throughput()
    throughput.add(prompt=0, generated=50, now=100.0)
    assert throughput.seconds_to_begin(500, 101.0) == math.inf


def test_a_full_page_under_both_names_takes_less_than_five_milliseconds() -> None:
    metrics = Metrics()
    metrics.attach(FakeEngine(), "fake", vllm_names=True)
    for number in range(2000):
        seconds = 0.001 * 1.006**number  # every bucket up to 150 s
        metrics.on_first_token(seconds)
        metrics.on_inter_token(seconds)
        metrics.on_tokens(prompt=number, generated=1)
        metrics.on_eviction(policy=f"policy {number % 20}", tokens=1)
    times = [_timed(metrics.render) for _ in range(21)]
    # The machine may be busy with something else: the fastest tells what the page takes, the median that it is usual.
    assert min(times) < 0.005
    assert statistics.median(times) < 0.02


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def test_vllms_names_are_repeated_on_request(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, metrics_compat=True))
    answer = live.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {name for name, _ in samples(answer.content)}
    assert {name.replace("octavo:", "vllm:") for name in names if name.startswith("octavo:")} == {
        name for name in names if name.startswith("vllm:")
    }
    plain = start(FakeEngine())
    assert "vllm:" not in plain.http.get("/metrics").text
