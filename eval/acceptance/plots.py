"""Draws the charts of a report as SVG. This module, and `html` which embeds them, need matplotlib (the `eval` extra).

Figures are narrow, so that their text stays legible at the width of a phone. Colours are Okabe and Ito's, told apart by
the colour-blind; every rule has a marker of its own too.
"""

from __future__ import annotations

import io
import textwrap

import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specdec.eval.acceptance.charts import Chart, Panel, Series

STYLE = {
    "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
    "legend.fontsize": 9, "svg.hashsalt": "specdec", "text.parse_math": False,
}  # fmt: skip
WIDTH, PANEL_HEIGHT, MARGIN = 5.0, 2.4, 1.1  # inches
TITLE_CHARACTERS = 64
MAX_LABEL_CHARACTERS = 36  # the most characters of all labels of an axis side by side
# By verification; "experts" is the chart of experts.
LOOKS = {
    "greedy": ("#000000", "D"), "coupled": ("#0072B2", "o"), "block": ("#D55E00", "s"), "token": ("#009E73", "^"),
    "experts": ("#0072B2", "o"),
}  # fmt: skip
OTHER_LOOK = ("#CC79A7", "v")


def draw(chart: Chart) -> bytes:
    """Returns the chart as an SVG file; the same bytes for the same chart."""
    file = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        figure_of(chart).savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def figure_of(chart: Chart) -> Figure:
    """Returns a figure that has one panel above the other, with the same axes."""
    figure = Figure(figsize=(WIDTH, MARGIN + PANEL_HEIGHT * len(chart.panels)), layout="constrained")
    figure.suptitle(chart.title, fontsize=11, fontweight="bold")
    rows = figure.subplots(len(chart.panels), 1, sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Artist] = {}
    for axes, panel in zip(rows[:, 0], chart.panels):
        _draw_panel(axes, chart, panel)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    _label(figure, rows[-1, 0], chart)
    ncols = 3 if len(handles) > 4 else 2
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=ncols)
    return figure


def _draw_panel(axes: Axes, chart: Chart, panel: Panel) -> None:
    for i, line in enumerate(panel.background):
        axes.plot(line.xs, line.ys, color="#999999", linewidth=0.7, alpha=0.6, label=line.label if i == 0 else None)
    if panel.guide is not None:
        guide = panel.guide
        axes.plot(guide.xs, guide.ys, color="#555555", linewidth=1.2, linestyle="--", label=guide.label)
    for i, series in enumerate(panel.series):
        _draw_series(axes, series, chart.dodge * (i - (len(panel.series) - 1) / 2))
    details = "; ".join(f"{s.label} {s.detail}" for s in panel.series if s.detail)
    axes.set_title("\n".join([panel.title, *textwrap.wrap(details, TITLE_CHARACTERS)]), loc="left")


def _label(figure: Figure, axes: Axes, chart: Chart) -> None:
    """Labels the axes that all panels share; `axes` is that at the bottom."""
    axes.set_xlabel(chart.x_label)
    figure.supylabel(chart.y_label, fontsize="medium")
    if chart.ticks:
        labels = [label for _, label in chart.ticks]
        slanted = sum(map(len, labels)) > MAX_LABEL_CHARACTERS
        axes.set_xticks([x for x, _ in chart.ticks], labels, rotation=35 if slanted else 0)
        axes.set_xlim(chart.ticks[0][0] - 0.5, chart.ticks[-1][0] + 0.5)
    axes.set_ylim(*chart.limits)


def _draw_series(axes: Axes, series: Series, shift: float) -> None:
    """Draws a series, with gaps where there is no value, and intervals as vertical lines."""
    colour, marker = LOOKS.get(series.key[0], OTHER_LOOK)
    greedy_drafts = series.key[1] == "greedy" != series.key[0]
    xs = np.array([p.x for p in series.points]) + shift
    value, low, high = (
        np.array([np.nan if (v := p.estimate[name]) is None else v for p in series.points])
        for name in ("value", "low", "high")
    )
    axes.vlines(xs, low, high, color=colour, linewidth=1.6)
    axes.plot(
        xs, value, color=colour, marker=marker, markersize=5.5, linewidth=1.2, label=series.label,
        linestyle=":" if greedy_drafts else "-", markerfacecolor="white" if greedy_drafts else colour,
    )  # fmt: skip
