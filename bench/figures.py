"""The look of the measuring commands' pictures: one style, a row of axes, and the curves that several of them draw."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench.measure import percentile

INK, QUIET, GRID = "#1f1f1e", "#6f6e69", "#e6e5e0"
BLUE, AMBER, GREEN, GREY = "#1f5fa8", "#d98a3d", "#6a9a58", "#a8a69e"
COLORS = (BLUE, AMBER, GREEN, "#8b5fa5", "#b8473f", "#3d8f94", "#8a6b45", GREY)
"""For what has no order."""
_SURFACE = "#fcfcfb"
_POINTS_PER_CURVE = 400
_LEAST_MS = 0.05
"""Shorter times are drawn here: chunks that came in one read are 0 apart, which a logarithm cannot show."""


@contextmanager
def picture(path: str, columns: int, *, title: str, width: float = 13, shared: bool = False) -> Iterator[list[Axes]]:
    """A row of empty axes to draw in, all of one scale if ``shared``.

    It is written to ``path`` when the block ends, in the format that its ending names.

    Raises OSError or ValueError (unknown format).
    """
    style = {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": QUIET,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "axes.edgecolor": GRID,
        "axes.facecolor": _SURFACE,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "figure.facecolor": _SURFACE,
        "grid.color": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    with mpl.rc_context(style):
        drawn = Figure(figsize=(width, 4.4), layout="constrained")  # without pyplot: no window system is touched
        drawn.suptitle(title, x=0.008, ha="left", fontsize=13, fontweight="bold")
        yield list(drawn.subplots(1, columns, squeeze=False, sharex=shared, sharey=shared)[0])
        drawn.savefig(path, dpi=120)


def formats() -> list[str]:
    """The endings of files that can be drawn."""
    return sorted(Figure().canvas.get_supported_filetypes())


def shades(count: int) -> list[tuple[float, ...]]:
    """One hue from light to dark, for what has an order."""
    ramp = mpl.colormaps["Blues"]
    return [tuple(ramp(0.95 if count == 1 else 0.40 + 0.58 * index / (count - 1))) for index in range(count)]


def cumulative(axes: Axes, samples: Mapping[str, Sequence[float]], colors: Sequence[object]) -> None:
    """The share of values, in ms, at or below x, a curve per name, over a logarithmic x.

    Drawn through quantiles: its size does not grow with the number of samples.
    """
    lowest, highest = math.inf, 0.0
    shares = [100 * step / _POINTS_PER_CURVE for step in range(_POINTS_PER_CURVE + 1)]
    for (name, values), color in zip(samples.items(), colors, strict=True):
        ordered = sorted(max(value, _LEAST_MS) for value in values)
        if ordered:
            quantiles = [percentile(ordered, share) for share in shares]
            axes.plot(quantiles, shares, color=color, linewidth=2, label=name)
            lowest, highest = min(lowest, percentile(ordered, 1)), max(highest, ordered[-1])
    axes.set_xscale("log")
    if highest > 0:
        axes.set_xlim(lowest / 1.15, highest * 1.15)
    logarithmic(axes.xaxis)
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")


def logarithmic(axis: Axis) -> None:
    """Plain numbers on an axis whose scale is logarithmic and whose limits are set: at 1, 2 and 5 where it is short."""
    lowest, highest = axis.get_view_interval()
    steps = (1.0,) if highest > 50 * lowest else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_formatter(NullFormatter())


def against_budget(axes: Axes, points: Sequence[tuple[str, int | None, float]]) -> None:
    """(name, tokens kept, value) as a curve per name over a logarithmic x; without a budget, a line across."""
    curves = {name: [(x, y) for other, x, y in points if other == name and x is not None] for name, _, _ in points}
    for (name, curve), color in zip(((n, c) for n, c in curves.items() if c), itertools.cycle(COLORS), strict=False):
        axes.plot(*zip(*sorted(curve), strict=True), "o-", color=color, linewidth=2, markersize=5, label=name)
    for name, budget, value in points:
        if budget is None:
            axes.axhline(value, color=INK, linestyle=":", linewidth=1.5, label=name)
    axes.set(xscale="log", xlabel="tokens kept, logarithmic")
    axes.set_xticks(sorted({budget for _, budget, _ in points if budget is not None}))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend()
