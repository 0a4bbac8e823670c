"""One picture of a load test: throughput against latency over the levels, and how TTFT and ITL are distributed."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from bench.figures import QUIET, cumulative, picture, shades
from bench.measure import Run, Summary, samples_ms, summarize


def draw(path: str, by_level: Mapping[str, Sequence[Run]], *, title: str) -> None:
    """Write the picture to ``path`` (the ending names the format). Raises OSError or ValueError (unknown format)."""
    colors = shades(len(by_level))
    with picture(path, 3, title=title) as (left, middle, right):
        _throughput(left, [summarize(runs) for runs in by_level.values()], colors)
        for axes, metric, name in (
            (middle, "ttft", "Time to first token"),
            (right, "itl", "Inter-token latency"),
        ):
            samples = {label: samples_ms(r for run in runs for r in run.records) for label, runs in by_level.items()}
            cumulative(axes, {label: values[metric] for label, values in samples.items()}, colors)
            axes.set(title=name, xlabel="ms, logarithmic")
        middle.set_ylabel("share of requests at or below")
        right.set_ylabel("share of gaps at or below")
        handles, labels = middle.get_legend_handles_labels()
        if handles:
            right.legend(handles, labels, loc="lower right")


def _throughput(axes: Axes, summaries: Sequence[Summary], colors: Sequence[tuple[float, ...]]) -> None:
    """Request latency, median and p99, over output tokens per second; a point per level."""
    points = [(s, latency, c) for s, c in zip(summaries, colors, strict=True) if (latency := s.ms["latency"])]
    rates = [summary.output_tokens_per_s for summary, _, _ in points]
    for statistic, line in (("p99", ":"), ("p50", "-")):
        values = [getattr(latency, statistic) / 1e3 for _, latency, _ in points]
        axes.plot(rates, values, line, color=QUIET, linewidth=1.2, zorder=1)
        axes.scatter(rates, values, c=[c for _, _, c in points], s=44 if statistic == "p50" else 18, zorder=2)
        if points:
            axes.annotate(statistic, (rates[-1], values[-1]), xytext=(8, -3), textcoords="offset points", color=QUIET)
    for summary, latency, _ in points:
        place = (summary.output_tokens_per_s, latency.p50 / 1e3)
        axes.annotate(summary.label, place, xytext=(5, -15), textcoords="offset points", fontsize=9)
    axes.set_title("Throughput against latency")
    axes.set_xlabel("output tokens/s")
    axes.set_ylabel("request latency, s")
    axes.set_xlim(0, 1.2 * max(rates, default=1.0))  # room for the labels on the right
    axes.set_ylim(bottom=0)
