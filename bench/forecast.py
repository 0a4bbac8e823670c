"""What a simulated or a recorded load amounts to, in the terms of `octavo bench serve`; tables and a picture of it."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench import output
from bench.measure import RequestRecord, Stats, meets, percentile, samples_ms, stats
from scheduler.cluster import Outcome
from scheduler.simulator import Served

METRICS: Final = ("ttft", "tpot", "latency")
_LEAST_QUARTER: Final = 10
_GROWTH: Final = 0.05
"""Seconds that the median wait grows by, per second of the load, where the load is more than can be served."""
_FAR_APART: Final = 20
"""Between the numbers of replicas in a picture; farther, and they are shown over a logarithmic axis."""
_LEAST_ENDED: Final = 10
"""With fewer ends the second half of a load tells no rate."""
_NAMES: Final = {"ttft": "TTFT", "tpot": "TPOT", "latency": "latency"}


@dataclass(frozen=True, slots=True)
class Speed:
    """Rates and times. A request that timed out in the queue counts in ``failed`` alone."""

    requests: int
    failed: int
    cached_tokens: int
    """Of their prompts, that a prefix cache held."""
    requests_per_s: float
    output_tokens_per_s: float
    goodput: float | None
    """Requests per second that met the objective; None without one."""
    attained: float | None
    """The share that did, 0 to 1, failed ones included."""
    ms: Mapping[str, Stats | None]
    """By name in ``METRICS``, milliseconds."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What N replicas do. Counts and times are the simulated sample's, rates the whole cluster's."""

    replicas: int
    simulated: int
    speed: Speed
    utilization: float
    """The share of the time in which a step runs, with however few sequences."""
    occupancy: float
    """Sequences in a step, on average."""
    peak_kv: float
    kv_waste: float
    preemptions: int
    prefix_hits: float
    unserved: int
    note: str


def speed_of(
    served: Sequence[Served], objective: Mapping[str, float], *, share: float = 1.0, steady: bool = False
) -> Speed:
    """The rates and times of requests that are ``share`` of all; rates are those of all.

    Rates are over the time from the first arrival to the last token, or, if ``steady``, over the second half of the
    time in which requests come, when the cluster is neither filling up nor running empty.
    """
    records = [_record(one) for one in served]
    done = [record for record in records if record.error is None]
    counted, seconds = _window(records, steady)
    good = [record for record in counted if meets(record, objective)]
    samples = samples_ms(done)
    scale = 1 / (share * seconds) if seconds > 0 and share > 0 else 0.0
    return Speed(
        requests=len(done),
        failed=len(records) - len(done),
        cached_tokens=sum(record.cached_tokens for record in done),
        requests_per_s=sum(record.error is None for record in counted) * scale,
        output_tokens_per_s=sum(record.output_tokens for record in counted) * scale,
        goodput=len(good) * scale if objective else None,
        attained=sum(meets(record, objective) for record in records) / max(len(records), 1) if objective else None,
        ms={name: stats(samples[name]) for name in METRICS},
    )


def _window(records: Sequence[RequestRecord], steady: bool) -> tuple[Sequence[RequestRecord], float]:
    """The requests that ended in the time over which rates are, and its seconds."""
    if not records:
        return [], 0.0
    first, last = (bound(record.start for record in records) for bound in (min, max))
    middle = (first + last) / 2
    ended = [record for record in records if middle < record.last <= last]
    if steady and len(ended) >= _LEAST_ENDED:
        return ended, last - middle
    return records, max(record.last for record in records) - first


def forecast_of(outcome: Outcome, objective: Mapping[str, float]) -> Forecast:
    """The figures of a simulated cluster."""
    return Forecast(
        replicas=outcome.cluster.replicas,
        simulated=len(outcome.lives),
        speed=speed_of(outcome.served, objective, share=outcome.sent / max(outcome.total, 1), steady=True),
        utilization=outcome.utilization,
        occupancy=outcome.occupancy,
        peak_kv=outcome.peak_kv,
        kv_waste=outcome.kv_waste,
        preemptions=outcome.preemptions,
        prefix_hits=outcome.prefix_hits,
        unserved=outcome.unserved,
        note=outcome.note,
    )


def _record(served: Served) -> RequestRecord:
    """A request as a client would have seen it, but for the moments of the tokens between the first and the last."""
    failed = served.first is None
    return RequestRecord(
        served.serial,
        start=served.arrival,
        chunk_times=array("d") if served.first is None else array("d", [served.first, served.last]),
        last=served.last,
        prompt_tokens=served.prompt_tokens,
        output_tokens=served.output_tokens,
        cached_tokens=served.cached_tokens,
        error="timed out in the queue" if failed else None,
    )


def table(forecasts: Sequence[Forecast]) -> str:
    """One column per number of replicas, one row per figure."""
    rows: list[list[str]] = []

    def add(name: str, cells: Sequence[str]) -> None:
        rows.append([name, *cells])

    speeds = [forecast.speed for forecast in forecasts]
    add("requests/s", [output.figure(speed.requests_per_s) for speed in speeds])
    add("output tok/s", [output.figure(speed.output_tokens_per_s) for speed in speeds])
    if any(speed.attained is not None for speed in speeds):
        add("goodput, requests/s", [output.figure(speed.goodput) for speed in speeds])
        add("objective met", [share(speed.attained) for speed in speeds])
    for metric in METRICS:
        for part in ("p50", "p90", "p99"):
            add(f"{_NAMES[metric]} {part}, ms", [output.figure(_part(speed, metric, part)) for speed in speeds])
    add("utilization", [share(forecast.utilization) for forecast in forecasts])
    add("sequences per step", [output.figure(forecast.occupancy) for forecast in forecasts])
    add("peak KV use", [share(forecast.peak_kv) for forecast in forecasts])
    add("KV waste", [share(forecast.kv_waste) for forecast in forecasts])
    add("prefix hits", [share(forecast.prefix_hits) for forecast in forecasts])
    add("preemptions", [f"{forecast.preemptions:,}" for forecast in forecasts])
    if any(speed.failed for speed in speeds):
        add("timed out", [f"{speed.failed:,}" for speed in speeds])
    if any(forecast.unserved for forecast in forecasts):
        add("left waiting", [f"{forecast.unserved:,}" for forecast in forecasts])
    add("requests simulated", [f"{speed.requests + speed.failed:,}" for speed in speeds])
    add("replicas simulated", [f"{forecast.simulated:,}" for forecast in forecasts])
    return output.table(["replicas", *(f"{forecast.replicas:,}" for forecast in forecasts)], rows)


def table_of_tries(forecasts: Sequence[Forecast], attainment: float) -> str:
    """One row per number of replicas that was tried, in the order of the tries."""
    head = ["replicas", "enough", "objective\nmet", "TTFT\np50 ms", "\np99 ms", "TPOT\np50 ms", "\np99 ms"]
    head += ["sequences\nper step", "replicas\nsimulated"]
    rows = []
    for forecast in forecasts:
        times = [_part(forecast.speed, metric, part) for metric in ("ttft", "tpot") for part in ("p50", "p99")]
        enough = "yes" if (forecast.speed.attained or 0.0) >= attainment else "no"
        shares = [share(forecast.speed.attained), *map(output.figure, [*times, forecast.occupancy])]
        rows.append([f"{forecast.replicas:,}", enough, *shares, f"{forecast.simulated:,}"])
    return output.table(head, rows)


def comparison(measured: Speed, predicted: Speed) -> str:
    """A row per figure: what was measured, what the simulator says, and how far off that is."""
    rows = []
    for name, real, said in pairs(measured, predicted):
        gap = f"{said / real - 1:+.1%}" if real and said is not None else "-"
        rows.append([name, output.figure(real), output.figure(said), gap])
    return output.table(["", "measured", "simulated", "difference"], rows)


def pairs(measured: Speed, predicted: Speed) -> list[tuple[str, float | None, float | None]]:
    """(figure, measured, predicted) of each figure that a comparison shows."""
    both = (measured, predicted)
    figures: list[tuple[str, list[float | None]]] = [
        ("requests/s", [speed.requests_per_s for speed in both]),
        ("output tok/s", [speed.output_tokens_per_s for speed in both]),
        ("cached prompt tokens", [speed.cached_tokens for speed in both]),
    ]
    figures += [
        (f"{_NAMES[metric]} {part}, ms", [_part(speed, metric, part) for speed in both])
        for metric in METRICS
        for part in ("mean", "p50", "p90", "p99")
    ]
    return [(name, real, said) for name, (real, said) in figures]


def cautions(served: Sequence[Served]) -> list[str]:
    """What a reader must know before trusting the figures of a simulated load: one sentence each."""
    begun = sorted((one for one in served if one.first is not None), key=lambda one: one.arrival)
    quarter = len(begun) // 4
    if quarter < _LEAST_QUARTER:
        return ["fewer than 40 requests were simulated: the percentiles are rough"]
    window = begun[-1].arrival - begun[0].arrival
    second, last = (_median([(one.first or 0.0) - one.arrival for one in part]) for part in _quarters(begun, quarter))
    latency = _median([one.last - one.arrival for one in begun])
    found = []
    if last - second > _GROWTH * window:
        found.append(
            f"it does not keep up: the median TTFT was {second:.1f} s in the load's second quarter and {last:.1f} s in "
            "its last, and would go on growing"
        )
    elif latency > window / 4:
        found.append(
            f"a median latency of {latency:.1f} s is long beside the {window:.1f} s in which the requests came: the "
            "replicas begin empty, so a longer load would look worse"
        )
    return found


def _quarters(served: Sequence[Served], quarter: int) -> tuple[Sequence[Served], Sequence[Served]]:
    """The second and the last."""
    return served[quarter : 2 * quarter], served[-quarter:]


def _median(values: Sequence[float]) -> float:
    return percentile(sorted(values), 50)


def share(value: float | None) -> str:
    """A share of 1 as a percentage; a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"


def _part(speed: Speed, metric: str, part: str) -> float | None:
    values = speed.ms[metric]
    return None if values is None else getattr(values, part)


def draw(path: str, outcomes: Sequence[tuple[Forecast, Mapping[str, Sequence[float]]]], *, title: str) -> None:
    """Draw the load of the replicas over their number, and how TTFT and TPOT are distributed, a curve per number.

    Raises OSError or ValueError (unknown format).
    """
    from bench.figures import AMBER, BLUE, cumulative, picture, shades

    ordered = sorted(outcomes, key=lambda outcome: outcome[0].replicas)
    forecasts = [forecast for forecast, _ in ordered]
    numbers = [forecast.replicas for forecast in forecasts]
    with picture(path, 3, title=title) as (left, middle, right):
        left.plot(numbers, [100 * forecast.peak_kv for forecast in forecasts], "o-", color=AMBER, label="peak KV use")
        met = [100 * forecast.speed.attained for forecast in forecasts if forecast.speed.attained is not None]
        if met:
            left.plot(numbers, met, "o-", color=BLUE, label="objective met")
        scale = "log" if numbers[-1] > _FAR_APART * numbers[0] else "linear"
        label = "number of replicas" + (", logarithmic" if scale == "log" else "")
        left.set(title="Replicas", xlabel=label, xscale=scale, ylim=(0, 105))
        left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        left.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
        left.legend()
        colors = shades(len(ordered))
        for axes, metric, name in ((middle, "ttft", "Time to first token"), (right, "tpot", "Time per output token")):
            curves = {f"{forecast.replicas:,}": samples[metric] for forecast, samples in ordered}
            cumulative(axes, curves, colors)
            axes.set(title=name, xlabel="ms, logarithmic", ylabel="share of requests at or below")
        middle.legend(title="replicas", loc="lower right")


def samples_of(served: Sequence[Served]) -> Mapping[str, Sequence[float]]:
    """Every request's times in milliseconds, by name in ``METRICS``."""
    samples = samples_ms(map(_record, served))
    return {name: samples[name] for name in METRICS}
