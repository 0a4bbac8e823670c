from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from bench.figures import INK, against_budget, cumulative, formats, logarithmic, picture


def test_a_picture_is_written_in_the_format_of_its_ending_when_the_block_ends(tmp_path: Path) -> None:
    png, svg = tmp_path / "p.png", tmp_path / "p.svg"
    for path in (png, svg):
        with picture(str(path), 2, title="t") as axes:
            assert len(axes) == 2
            assert not path.exists()
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    assert {"png", "svg", "pdf"} <= set(formats())


def test_panels_that_are_compared_share_their_scales(tmp_path: Path) -> None:
    with picture(str(tmp_path / "p.svg"), 2, title="t", shared=True) as (left, right):
        left.plot([0, 10], [0, 100])
        right.plot([0, 1], [0, 1])
        assert (left.get_xlim(), left.get_ylim()) == (right.get_xlim(), right.get_ylim())


def test_a_cumulative_curve_goes_through_the_quantiles() -> None:
    axes = Figure().subplots()
    cumulative(axes, {"a": [400.0, 100.0, 200.0, 300.0, 500.0], "empty": []}, ["red", "blue"])
    (curve,) = axes.get_lines()
    points = dict(zip(curve.get_ydata(), curve.get_xdata(), strict=True))
    assert [points[share] for share in (0, 25, 50, 75, 100)] == pytest.approx([100, 200, 300, 400, 500])
    low, high = axes.get_xlim()
    assert low < 105 < 500 < high


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((90.0, 1100.0), ["100", "200", "500", "1,000"]), ((1.0, 3e5), ["1", "10", "100", "1,000"])],
)
def test_a_logarithmic_axis_has_plain_numbers_more_of_them_where_it_is_short(
    limits: tuple[float, float], expected: list[str]
) -> None:
    axes = Figure().subplots()
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    logarithmic(axes.yaxis)
    low, high = limits
    shown = [axes.yaxis.get_major_formatter()(tick) for tick in axes.yaxis.get_majorticklocs() if low <= tick <= high]
    assert shown[:4] == expected


def test_what_has_a_budget_is_a_curve_over_it_and_what_has_none_a_line_across() -> None:
    axes = Figure().subplots()
    against_budget(axes, [("full", None, 12.0), ("a", 128, 20.0), ("a", 64, 30.0), ("b", 64, 50.0)])
    first, second, across = axes.get_lines()
    assert [line.get_label() for line in axes.get_lines()] == ["a", "b", "full"]
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([64, 128], [30, 20])
    assert (list(second.get_xdata()), list(second.get_ydata())) == ([64], [50])
    assert list(across.get_ydata()) == [12, 12]
    assert first.get_color() != second.get_color() != across.get_color() == INK
    assert list(axes.get_xticks()) == [64, 128]
    assert axes.get_legend() is not None
