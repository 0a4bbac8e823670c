from array import array

import pytest

from bench.measure import RequestRecord, Run, Stats, cautions, meets, percentile, stats, summarize


def record(*chunks: float, start: float = 0.0, tokens: int | None = None, **fields: object) -> RequestRecord:
    made = RequestRecord(0, start=start, chunk_times=array("d", chunks), last=chunks[-1] if chunks else 0.0)
    made.output_tokens = len(chunks) if tokens is None else tokens
    made.counted_by_server = True
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_percentiles_are_linear_between_neighbours() -> None:
    values = [10.0, 20.0, 30.0, 40.0, 50.0]
    assert [percentile(values, p) for p in (0, 25, 50, 90, 100)] == [10, 20, 30, pytest.approx(46), 50]
    assert percentile([7.0], 99) == 7
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_percentiles_equal_numpys() -> None:
    numpy = pytest.importorskip("numpy")
    values = sorted((index * 7919 % 1009) / 10 for index in range(500))
    for percent in (1, 50, 90, 99, 99.9):
        assert percentile(values, percent) == pytest.approx(numpy.percentile(values, percent))


def test_stats_do_not_need_sorted_values_and_are_none_without_values() -> None:
    assert stats([3.0, 1.0, 2.0]) == Stats(2.0, 2.0, pytest.approx(2.8), pytest.approx(2.98))
    assert stats([]) is None


def test_ttft_tpot_itl_and_latency_follow_their_definitions() -> None:
    request = record(10.5, 10.6, 10.8, start=10.0)
    assert request.ttft == pytest.approx(0.5)
    assert request.tpot == pytest.approx(0.15)
    assert request.itl == pytest.approx([0.1, 0.2])
    assert request.latency == pytest.approx(0.8)
    assert request.latency == pytest.approx(request.ttft + request.tpot * (request.output_tokens - 1))


def test_tpot_counts_tokens_not_chunks_and_is_undefined_for_one_token() -> None:
    assert record(1.0, 2.0, tokens=5).tpot == pytest.approx(0.25)
    assert record(1.0).tpot is None


def test_throughput_is_over_the_duration_and_failures_count_in_nothing_else() -> None:
    good = [record(0.5, 1.0, 1.5, prompt_tokens=10) for _ in range(4)]
    bad = record(0.2, error="HTTP 500: it broke")
    summary = summarize([Run("c=1", 0, [*good, bad], duration=2.0)])
    assert (summary.requests, summary.failed) == (4, 1)
    assert summary.requests_per_s == 2
    assert summary.output_tokens_per_s == 6
    assert summary.total_tokens_per_s == 26
    assert summary.ms["ttft"] == Stats(500, 500, 500, 500)
    assert summary.goodput is None


def test_repeats_are_pooled_and_their_spread_is_kept() -> None:
    runs = [
        Run("c=1", 0, [record(0.5, 1.0, prompt_tokens=1)], duration=1.0),
        Run("c=1", 1, [record(0.5, 1.0, prompt_tokens=1)], duration=3.0),
    ]
    summary = summarize(runs)
    assert summary.output_tokens_per_s == 1
    assert summary.output_tokens_per_s_by_run == (2, pytest.approx(2 / 3))


def test_an_unknown_prompt_length_leaves_the_total_unknown() -> None:
    assert summarize([Run("c=1", 0, [record(1.0)], duration=1.0)]).total_tokens_per_s is None


def test_nothing_completed_still_makes_a_summary() -> None:
    summary = summarize([Run("c=1", 0, [record(error="timeout")], duration=0.0)], {"ttft": 1.0})
    assert summary.ms["ttft"] is None
    assert summary.output_tokens_per_s == 0
    assert summary.goodput is not None
    assert summary.goodput.share == 0


def test_goodput_wants_every_objective_met() -> None:
    request = record(0.1, 0.15, 0.2)  # TTFT 100 ms, TPOT 50 ms, latency 200 ms
    assert meets(request, {"ttft": 101, "tpot": 51, "latency": 201})
    assert not meets(request, {"ttft": 99, "tpot": 51})
    assert not meets(request, {"ttft": 101, "tpot": 49})
    assert not meets(request, {"latency": 199})
    assert meets(record(0.1), {"tpot": 1})
    assert not meets(record(0.1, error="timeout"), {"ttft": 1000})


def test_goodputs_share_counts_failures_as_misses() -> None:
    records = [record(0.1), record(0.3), record(error="timeout"), record(0.1)]
    goodput = summarize([Run("c=1", 0, records, duration=4.0)], {"ttft": 200}).goodput
    assert goodput is not None
    assert goodput.share == 0.5
    assert goodput.requests_per_s == 0.5


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (record(1.0, 2.0, counted_by_server=False), "without usage"),
        (record(1.0, tokens=8), "8.0 tokens per chunk"),
        (record(1.0, asked_tokens=5), "shorter than asked"),
        (record(1.0, prompt_tokens=100, cached_tokens=64), "64% of the prompt"),
        (record(1.0, start=0.5, scheduled=0.1), "left late"),
    ],
)
def test_what_makes_figures_doubtful_is_said(made: RequestRecord, words: str) -> None:
    (caution,) = cautions([Run("c=1", 0, [made], duration=1.0)])
    assert words in caution


def test_a_busy_client_is_said_and_a_sound_run_has_no_cautions() -> None:
    sound = record(1.0, 2.0, asked_tokens=2, prompt_tokens=10)
    assert cautions([Run("c=1", 0, [sound], duration=1.0, client_cpu=0.3)]) == []
    (caution,) = cautions([Run("c=1", 0, [sound], duration=1.0, client_cpu=0.9)])
    assert "90% of a core" in caution
