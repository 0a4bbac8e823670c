"""What is shown and kept: an aligned table, the distinct errors, and a JSON document that says how it came about."""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from bench.measure import METRICS, RequestRecord, Run, Stats, Summary
from bench.output import circumstances, machine
from bench.serve import command_line, public_arguments

_NAMES = {"ttft": "TTFT ms", "tpot": "TPOT ms", "itl": "ITL ms", "latency": "latency ms"}
_STATISTICS = ("mean", "p50", "p90", "p99")


def table(summaries: Sequence[Summary], *, title: str) -> str:
    """One column per level, one row per figure."""
    rows: list[tuple[str, str, list[str]]] = [("", "", [summary.label for summary in summaries])]

    def add(name: str, unit: str, value: Callable[[Summary], str]) -> None:
        rows.append((name, unit, [value(summary) for summary in summaries]))

    add("requests", "", lambda s: str(s.requests))
    add("failed", "", lambda s: str(s.failed))
    if any(s.interrupted for s in summaries):
        add("interrupted", "", lambda s: str(s.interrupted))
    add("duration", "s", lambda s: f"{s.duration_s:.2f}")
    add("requests/s", "", lambda s: f"{s.requests_per_s:.2f}")
    add("output tok/s", "", lambda s: f"{s.output_tokens_per_s:.1f}")
    if any(s.runs > 1 for s in summaries):
        add("", "lowest run", lambda s: f"{min(s.output_tokens_per_s_by_run):.1f}")
        add("", "highest run", lambda s: f"{max(s.output_tokens_per_s_by_run):.1f}")
    add("total tok/s", "", lambda s: "-" if s.total_tokens_per_s is None else f"{s.total_tokens_per_s:.1f}")
    if any(s.goodput for s in summaries):
        add("goodput", "requests/s", lambda s: f"{s.goodput.requests_per_s:.2f}" if s.goodput else "-")
        add("", "of all", lambda s: f"{s.goodput.share:.0%}" if s.goodput else "-")
    add("client CPU", "of a core", lambda s: f"{s.client_cpu_share:.0%}")
    for metric in METRICS:
        for statistic in _STATISTICS:
            name = _NAMES[metric] if statistic == _STATISTICS[0] else ""
            add(name, statistic, lambda s, m=metric, f=statistic: _figure(s.ms[m], f))  # type: ignore[misc]
    return "\n".join([title, "", *_aligned(rows)])


def _figure(values: Stats | None, statistic: str) -> str:
    if values is None:
        return "-"
    value: float = getattr(values, statistic)
    return f"{value:.0f}" if value >= 10_000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _aligned(rows: Sequence[tuple[str, str, list[str]]]) -> list[str]:
    names = max(len(name) for name, _, _ in rows)
    units = max(len(unit) for _, unit, _ in rows)
    width = max(9, *(len(cell) for _, _, cells in rows for cell in cells))
    return [
        f"{name:<{names}}  {unit:<{units}}" + "".join(f"  {cell:>{width}}" for cell in cells)
        for name, unit, cells in rows
    ]


def error_lines(runs: Sequence[Run]) -> list[str]:
    """Each distinct error with how often it happened, the most frequent first; empty when nothing failed."""
    errors = Counter(record.error for run in runs for record in run.records if record.error is not None)
    if not errors:
        return []
    total = sum(len(run.records) for run in runs)
    shown = [f"  {count} x {message}" for message, count in errors.most_common(10)]
    more = [f"  and {len(errors) - 10} other errors"] if len(errors) > 10 else []
    return [f"{errors.total()} of {total} requests failed:", *shown, *more]


class Findings(Protocol):
    """What the document needs of a session."""

    @property
    def model(self) -> str: ...
    @property
    def server_version(self) -> Any: ...
    @property
    def interrupted(self) -> bool: ...


def document(
    args: argparse.Namespace,
    findings: Findings,
    objective: Mapping[str, float],
    summaries: Sequence[Summary],
    runs: Sequence[Run],
) -> dict[str, Any]:
    """Everything measured and the circumstances, ready for JSON. Nothing in it is secret: the API key is left out."""
    return {
        **circumstances(command_line(args), public_arguments(args)),
        "label": args.label or findings.model,
        "client_machine": machine(),
        "server": {"base_url": args.base_url, "model": findings.model, "version": findings.server_version},
        "interrupted": findings.interrupted,
        "goodput_objective_ms": dict(objective),
        "levels": [asdict(summary) for summary in summaries],
        "errors": dict(Counter(r.error for run in runs for r in run.records if r.error is not None)),
        **({"runs": [_details(run) for run in runs]} if args.details else {}),
    }


def _details(run: Run) -> dict[str, Any]:
    begin = min(record.start for record in run.records)
    return {
        "label": run.label,
        "repeat": run.repeat,
        "duration_s": run.duration,
        "requests": [_request(record, begin) for record in sorted(run.records, key=lambda r: r.index)],
    }


def _request(record: RequestRecord, begin: float) -> dict[str, Any]:
    """A record with its times relative to the run's first request, to the microsecond."""
    return {
        "index": record.index,
        "start_s": round(record.start - begin, 6),
        "chunk_times_s": [round(moment - begin, 6) for moment in record.chunk_times],
        "last_s": round(record.last - begin, 6),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "output_tokens": record.output_tokens,
        "error": record.error,
    }
