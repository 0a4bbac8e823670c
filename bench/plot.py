"""One picture of a load test: throughput against latency over the levels, and how TTFT and ITL are distributed."""

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench.measure import Run, Summary, percentile, samples_ms, summarize

_SURFACE, _INK, _QUIET = "#fcfcfb", "#1f1f1e", "#6f6e69"
_GRID = "#e6e5e0"
_POINTS_PER_CURVE = 400
_LEAST_MS = 0.05
"""Shorter times are drawn here: chunks that came in one read are 0 apart, which a logarithm cannot show."""


def draw(path: str, by_level: Mapping[str, Sequence[Run]], *, title: str) -> None:
    """Write the picture to ``path`` (the ending names the format). Raises OSError or ValueError (unknown format)."""
    colors = _shades(len(by_level))
    style = {
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _QUIET,
        "xtick.color": _QUIET,
        "ytick.color": _QUIET,
        "axes.edgecolor": _GRID,
        "axes.facecolor": _SURFACE,
        "figure.facecolor": _SURFACE,
        "grid.color": _GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(13, 4.4), layout="constrained")  # a Figure without pyplot: no window system is touched
        left, middle, right = figure.subplots(1, 3)
        _throughput(left, [summarize(runs) for runs in by_level.values()], colors)
        for axes, metric, name in (
            (middle, "ttft", "Time to first token"),
            (right, "itl", "Inter-token latency"),
        ):
            samples = {label: samples_ms(r for run in runs for r in run.records) for label, runs in by_level.items()}
            _distribution(axes, {label: values[metric] for label, values in samples.items()}, colors)
            axes.set_title(name, loc="left", fontsize=11)
            axes.set_xlabel("ms, logarithmic")
        middle.set_ylabel("share of requests at or below")
        right.set_ylabel("share of gaps at or below")
        handles, labels = middle.get_legend_handles_labels()
        if handles:
            right.legend(handles, labels, loc="lower right", frameon=False, fontsize=9)
        figure.suptitle(title, x=0.008, ha="left", fontsize=13, fontweight="bold")
        figure.savefig(path, dpi=150)


def _shades(count: int) -> list[tuple[float, ...]]:
    """One hue from light to dark: levels are ordered, and so are these."""
    ramp = mpl.colormaps["Blues"]
    return [tuple(ramp(0.95 if count == 1 else 0.40 + 0.58 * index / (count - 1))) for index in range(count)]


def _throughput(axes: Axes, summaries: Sequence[Summary], colors: Sequence[tuple[float, ...]]) -> None:
    """Request latency, median and p99, over output tokens per second; a point per level."""
    points = [(s, latency, c) for s, c in zip(summaries, colors, strict=True) if (latency := s.ms["latency"])]
    rates = [summary.output_tokens_per_s for summary, _, _ in points]
    for statistic, line in (("p99", ":"), ("p50", "-")):
        values = [getattr(latency, statistic) / 1e3 for _, latency, _ in points]
        axes.plot(rates, values, line, color=_QUIET, linewidth=1.2, zorder=1)
        axes.scatter(rates, values, c=[c for _, _, c in points], s=44 if statistic == "p50" else 18, zorder=2)
        if points:
            axes.annotate(statistic, (rates[-1], values[-1]), xytext=(8, -3), textcoords="offset points", color=_QUIET)
    for summary, latency, _ in points:
        place = (summary.output_tokens_per_s, latency.p50 / 1e3)
        axes.annotate(summary.label, place, xytext=(5, -15), textcoords="offset points", fontsize=9)
    axes.set_title("Throughput against latency", loc="left", fontsize=11)
    axes.set_xlabel("output tokens/s")
    axes.set_ylabel("request latency, s")
    axes.set_xlim(0, 1.2 * max(rates, default=1.0))  # room for the labels on the right
    axes.set_ylim(bottom=0)
    axes.grid(visible=True)
    axes.set_axisbelow(True)


def _distribution(axes: Axes, samples: Mapping[str, Sequence[float]], colors: Sequence[tuple[float, ...]]) -> None:
    """An empirical CDF per level, as quantiles: its size does not grow with the number of samples."""
    lowest, highest = math.inf, 0.0
    shares = [100 * step / _POINTS_PER_CURVE for step in range(_POINTS_PER_CURVE + 1)]
    for (label, values), color in zip(samples.items(), colors, strict=True):
        ordered = sorted(max(value, _LEAST_MS) for value in values)
        if ordered:
            quantiles = [percentile(ordered, share) for share in shares]
            axes.plot(quantiles, shares, color=color, linewidth=2, label=label)
            lowest, highest = min(lowest, percentile(ordered, 1)), max(highest, ordered[-1])
    axes.set_xscale("log")
    if highest > 0:
        axes.set_xlim(lowest / 1.15, highest * 1.15)
    steps = (1.0,) if highest > 50 * lowest else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    axes.grid(visible=True, which="major")
    axes.set_axisbelow(True)
