"""What was measured, and what follows from it: per-request records to TTFT, TPOT, ITL, latency, throughput and goodput.

Pure functions over plain values. Times inside records are seconds of ``time.perf_counter()``; what is
reported is in milliseconds (latencies) and per second (rates). Failed requests count in ``failed`` and in
nothing else.
"""

import itertools
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

METRICS = ("ttft", "tpot", "itl", "latency")
OBJECTIVES = ("ttft", "tpot", "latency")


@dataclass(slots=True)
class RequestRecord:
    """One request as the client saw it. ``start`` is the moment before the request was sent."""

    index: int
    start: float = 0.0
    scheduled: float | None = None
    """When an open loop meant to send it; None in a closed loop."""
    chunk_times: "array[float]" = field(default_factory=lambda: array("d"))
    """Arrival of every chunk that carries tokens, in order."""
    last: float = 0.0
    """Arrival of the last chunk that carries tokens or the finish reason; for a failed request, when it failed."""
    asked_tokens: int = 0
    prompt_tokens: int | None = None
    output_tokens: int = 0
    cached_tokens: int = 0
    counted_by_server: bool = False
    """True when the server's usage gave ``output_tokens``; False when chunks were counted instead."""
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Time to first token, seconds."""
        return self.chunk_times[0] - self.start

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, seconds: (last - first) / (tokens - 1); None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.last - self.chunk_times[0]) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Gaps between consecutive chunks, seconds; one per token if the server sends one token per chunk."""
        times = self.chunk_times
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    @property
    def latency(self) -> float:
        """From sending to the last token, seconds."""
        return self.last - self.start


@dataclass(frozen=True, slots=True)
class Run:
    """One level driven once."""

    label: str
    repeat: int
    records: Sequence[RequestRecord]
    """The requests that ended, well or badly, in the order of their ends."""
    duration: float
    """Seconds from the first request's sending to the last one's end."""
    client_cpu: float = 0.0
    """Seconds of CPU that this process used meanwhile."""
    interrupted: int = 0
    """Requests in flight when the user stopped the run."""


@dataclass(frozen=True, slots=True)
class Stats:
    """A distribution in four numbers, in the unit of its values."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that met every objective: per second, and as a share (0 to 1) of all that ended, failures included."""

    requests_per_s: float
    share: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What one level (all its repeats pooled) amounts to. Rates are over the runs' summed duration."""

    label: str
    runs: int
    requests: int
    """Completed ones."""
    failed: int
    interrupted: int
    duration_s: float
    prompt_tokens: int | None
    """None when a server did not say and the client could not know."""
    cached_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float | None
    output_tokens_per_s_by_run: tuple[float, ...]
    client_cpu_share: float
    goodput: Goodput | None
    ms: Mapping[str, Stats | None]
    """By name in ``METRICS``, milliseconds; None where nothing was measured."""


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` (0 to 100) of the sorted values lie, linear between neighbours
    (NumPy's default).

    Raises ValueError when there are no values.
    """
    if not ordered:
        raise ValueError("no values to take a percentile of")
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def stats(values: Iterable[float]) -> Stats | None:
    """Mean, median, p90 and p99; None when there are no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    mean = math.fsum(ordered) / len(ordered)
    return Stats(mean, *(percentile(ordered, percent) for percent in (50, 90, 99)))


def samples_ms(records: Iterable[RequestRecord]) -> dict[str, list[float]]:
    """Every measured value in milliseconds, by name in ``METRICS``: one per request, but one per gap for ``itl``."""
    samples: dict[str, list[float]] = {name: [] for name in METRICS}
    for record in records:
        if record.error is not None:
            continue
        samples["ttft"].append(record.ttft * 1e3)
        samples["latency"].append(record.latency * 1e3)
        samples["itl"].extend(gap * 1e3 for gap in record.itl)
        if (tpot := record.tpot) is not None:
            samples["tpot"].append(tpot * 1e3)
    return samples


def meets(record: RequestRecord, objective: Mapping[str, float]) -> bool:
    """Whether a request met every objective (milliseconds, by name in ``OBJECTIVES``).

    A failed request meets none; one of a single token has no TPOT, so it cannot miss that objective.
    """
    if record.error is not None:
        return False
    measured = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "latency": record.latency}
    return all(measured[name] * 1e3 <= limit for name, limit in objective.items())


def summarize(runs: Sequence[Run], objective: Mapping[str, float] | None = None) -> Summary:
    """Pool the runs of one level. ``objective``: limits in milliseconds by name in ``OBJECTIVES``, for goodput."""
    records = [record for run in runs for record in run.records]
    done = [record for record in records if record.error is None]
    duration = math.fsum(run.duration for run in runs)
    known = [record.prompt_tokens for record in done if record.prompt_tokens is not None]
    prompt_tokens = sum(known) if len(known) == len(done) else None
    output_tokens = sum(record.output_tokens for record in done)
    goodput = None
    if objective:
        good = sum(meets(record, objective) for record in records)
        goodput = Goodput(_rate(good, duration), good / len(records) if records else 0.0)
    return Summary(
        label=runs[0].label,
        runs=len(runs),
        requests=len(done),
        failed=len(records) - len(done),
        interrupted=sum(run.interrupted for run in runs),
        duration_s=duration,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(record.cached_tokens for record in done),
        output_tokens=output_tokens,
        requests_per_s=_rate(len(done), duration),
        output_tokens_per_s=_rate(output_tokens, duration),
        total_tokens_per_s=None if prompt_tokens is None else _rate(prompt_tokens + output_tokens, duration),
        output_tokens_per_s_by_run=tuple(_output_rate(run) for run in runs),
        client_cpu_share=_rate(math.fsum(run.client_cpu for run in runs), duration),
        goodput=goodput,
        ms={name: stats(values) for name, values in samples_ms(done).items()},
    )


def cautions(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before trusting the figures of one level: one sentence each."""
    done = [record for run in runs for record in run.records if record.error is None]
    if not done:
        return []
    found = []
    uncounted = sum(not record.counted_by_server for record in done)
    if uncounted:
        found.append(f"{uncounted} answers without usage: their output tokens are the number of chunks")
    tokens, chunks = sum(r.output_tokens for r in done), sum(len(r.chunk_times) for r in done)
    if tokens > 1.2 * chunks:
        found.append(f"{tokens / chunks:.1f} tokens per chunk: ITL is the gap between chunks, not between tokens")
    short = sum(0 < record.output_tokens < record.asked_tokens for record in done)
    if short:
        found.append(f"{short} answers were shorter than asked for: compare only servers that honour ignore_eos")
    prompt = sum(record.prompt_tokens or 0 for record in done)
    cached = sum(record.cached_tokens for record in done)
    if cached > 0.05 * prompt:
        found.append(f"the server's prefix cache answered {cached / max(prompt, 1):.0%} of the prompt tokens")
    lags = sorted(record.start - record.scheduled for record in done if record.scheduled is not None)
    if lags and (lag := percentile(lags, 99)) > 0.010:
        found.append(f"requests left late (p99 {lag * 1e3:.0f} ms): this client could not keep up with the rate")
    busy = _rate(math.fsum(run.client_cpu for run in runs), math.fsum(run.duration for run in runs))
    if busy > 0.7:
        found.append(f"this client used {busy:.0%} of a core: it may be what limits the figures")
    return found


def _rate(count: float, duration: float) -> float:
    return count / duration if duration > 0 else 0.0


def _output_rate(run: Run) -> float:
    return _rate(sum(record.output_tokens for record in run.records if record.error is None), run.duration)
