"""How it is drawn: everything is inside the axes, nothing depends on the user's settings."""

from __future__ import annotations

import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from specdec.eval.acceptance.charts import Chart, build_charts
from specdec.eval.acceptance.plots import LOOKS, WIDTH, draw, figure_of
from support.acceptance_document import document, estimate

ONE_CELL = document((0.6,), ("coupled",), (1,), (1,), ("code",))
MANY_CELLS = document((0.0, 0.3, 0.6, 1.0), ("coupled", "block", "token"), (1, 3, 8), (1,))


def chart_of(made: dict[str, Any], name: str) -> Chart:
    (chart,) = [c for c in build_charts(made).charts if c.name == name]
    return chart


def assert_inside(axes: Axes, xs: list[float], ys: list[float]) -> None:
    for limits, values in ((axes.get_xlim(), xs), (axes.get_ylim(), ys)):
        assert min(limits) <= min(values), (limits, values)
        assert max(values) <= max(limits), (limits, values)


@pytest.mark.slow
@pytest.mark.parametrize("made", [document(), ONE_CELL, MANY_CELLS], ids=["default", "one cell", "many cells"])
def test_every_value_and_interval_is_inside_the_axes(made: dict[str, Any]) -> None:
    for chart in build_charts(made).charts:
        for axes, panel in zip(figure_of(chart).axes, chart.panels, strict=True):
            for series in panel.series:
                ys = [p.estimate[n] for p in series.known for n in ("value", "low", "high")]
                assert_inside(
                    axes, [p.x for p in series.known], [min(y, 1.0) if "acc" in chart.name else y for y in ys]
                )
            if panel.guide is not None:
                assert_inside(axes, [panel.guide.xs[0] + 0.5], panel.guide.ys)


def test_lines_and_intervals_are_those_of_the_estimates() -> None:
    made = document((0.6,), ("block", "token"), (1, 2, 3), (1,))
    made["cells"][2]["all"]["speedup"] = {"value": 1.4, "low": 1.45, "high": 1.5}  # a percentile interval may be so
    made["cells"][5]["all"]["speedup"] = estimate(None)
    made["cells"][6]["all"]["speedup"] = {"value": 1.7, "low": None, "high": None}
    chart = chart_of(made, "speedup-batch-1")
    (axes,) = figure_of(chart).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert np.array(lines["block"].get_ydata())[1] == 1.4
    values = np.array(lines["token"].get_ydata(), float)
    assert np.isnan(values[1])
    assert values[2] == 1.7
    assert list(lines["plain decoding"].get_ydata()) == [1, 1]
    segments = [s for c in axes.collections if isinstance(c, LineCollection) for s in c.get_segments() if len(s)]
    intervals = [(s[0, 1], s[1, 1]) for s in segments]
    assert (1.45, 1.5) in intervals
    assert len(intervals) == 4
    shown = np.concatenate([np.array(lines[name].get_xdata(), float) for name in ("block", "token")])
    assert len(set(shown)) == 6, "series at the same K stand beside each other"


def test_rules_differ_by_marker_and_by_colour() -> None:
    rules = ("greedy", "coupled", "block", "token")
    assert len({LOOKS[r][0] for r in rules}) == len({LOOKS[r][1] for r in rules}) == 4
    made = document((0.0, 0.6), ("coupled", "block", "token", "newer"), (1, 2), (1,))
    for one in made["cells"]:
        if one["verification"] == "token":
            one["draft_sampling"] = "greedy"
    lines = {
        line.get_label(): line for axes in figure_of(chart_of(made, "speedup-batch-1")).axes for line in axes.lines
    }
    drawn = [lines[name] for name in ("greedy", "coupled", "block", "token, greedy drafts", "newer")]
    assert len({str(line.get_marker()) for line in drawn}) == len({str(line.get_color()) for line in drawn}) == 5
    assert [line.get_markerfacecolor() == "white" for line in drawn] == [False, False, False, True, False]


@pytest.mark.slow
def test_axes_have_labels_and_the_legend_every_series() -> None:
    for chart in build_charts(document()).charts:
        figure = figure_of(chart)
        assert figure.get_suptitle() == chart.title
        assert figure.axes[-1].get_xlabel() == chart.x_label
        assert figure.get_supylabel() == chart.y_label
        (legend,) = figure.legends
        assert {s.label for p in chart.panels for s in p.series} <= {text.get_text() for text in legend.get_texts()}
        for axes, panel in zip(figure.axes, chart.panels, strict=True):
            title = axes.get_title(loc="left").replace("\n", " ")
            assert title.startswith(panel.title)
            assert all(f"{s.label} {s.detail}" in title for s in panel.series if s.detail)


@pytest.mark.slow
def test_a_chart_is_a_picture_as_wide_as_a_phone_shows() -> None:
    for chart in build_charts(ONE_CELL).charts:
        picture = ElementTree.fromstring(draw(chart))
        assert picture.tag.endswith("}svg")
        assert picture.attrib["width"] == f"{72 * WIDTH:g}pt"
        assert len([e for e in picture.iter() if e.tag.endswith(("}path", "}use"))]) > 20, "ink"


def test_svg_is_the_same_each_time_whatever_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    chart = chart_of(ONE_CELL, "calibration")
    first = draw(chart)
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "lines.linewidth": 9}):
        assert draw(chart) == first
    assert dict(matplotlib.rcParams) == before
    assert b"http" not in first.split(b"<g id=")[1]


def test_names_are_not_read_as_formulas() -> None:
    made = document((0.6,), ("$\\frac{$",), (1,), (1,))
    assert b"</svg>" in draw(chart_of(made, "speedup-batch-1"))


@pytest.mark.slow
def test_pyplot_is_not_used() -> None:
    """It keeps global state and looks for a screen."""
    program = (
        "import sys; from specdec.eval.acceptance.plots import draw; "
        "from specdec.eval.acceptance.charts import Chart, Panel, Point, Series; "
        "s = Series(('block', 'sampled'), 'block', [Point(1, 'one', {'value': 1, 'low': 0, 'high': 2})]); "
        "draw(Chart('n', 't', 'x', 'y', [Panel('p', [s])])); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_gaps_in_a_series_stay_gaps() -> None:
    made = document((0.6,), ("block",), (3,), (1,))
    made["cells"][1]["all"]["conditional"][1] = estimate(None)
    (axes,) = figure_of(chart_of(made, "acceptance-conditional")).axes
    values = np.array(axes.lines[0].get_ydata(), float)
    assert np.isnan(values).tolist() == [False, True, False]
    assert len(draw(chart_of(made, "acceptance-conditional"))) > 1000
