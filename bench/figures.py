"""The look of the measuring commands' pictures: one style, a row of axes, and the curves that several of them draw."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.measure import percentile

INK, QUIET, GRID = "#1f1f1e", "#6f6e69", "#e6e5e0"
BLUE, AMBER, GREEN, GREY = "#1f5fa8", "#d98a3d", "#6a9a58", "#a8a69e"
_SURFACE = "#fcfcfb"
_POINTS_PER_CURVE = 400


@contextmanager
def picture(path: str, columns: int, *, title: str, width: float = 13, share_y: bool = False) -> Iterator[list[Axes]]:
    """A row of empty axes to draw in; written to ``path`` when the block ends, in the format that its ending names.

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
        yield list(drawn.subplots(1, columns, squeeze=False, sharey=share_y)[0])
        drawn.savefig(path, dpi=150)


def shades(count: int) -> list[tuple[float, ...]]:
    """One hue from light to dark, for what has an order."""
    ramp = mpl.colormaps["Blues"]
    return [tuple(ramp(0.95 if count == 1 else 0.40 + 0.58 * index / (count - 1))) for index in range(count)]


def cumulative(axes: Axes, samples: Mapping[str, Sequence[float]], colors: Sequence[object]) -> None:
    """The share of values at or below x, a curve per name, over a logarithmic x; drawn through quantiles."""
    shares = [100 * step / _POINTS_PER_CURVE for step in range(_POINTS_PER_CURVE + 1)]
    for (name, values), color in zip(samples.items(), colors, strict=True):
        if ordered := sorted(values):
            axes.plot([percentile(ordered, share) for share in shares], shares, color=color, linewidth=2, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
