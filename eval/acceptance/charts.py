"""The plots of a report as data: `specdec.eval.acceptance.plots` draws them, the report tabulates them.

A chart has one panel per temperature. Of each rule it shows the cell with the most drafts per verification and then the
smallest batch, since acceptance does not depend on batches; the speed-up it shows for all of them. What has no data
is left out and named in `notes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from specdec.eval.acceptance.summary import (
    Cell,
    Estimate,
    SeriesKey,
    estimate_text,
    format_number,
    rule_label,
    series_key,
    series_order,
    speculative,
)

Bin = dict[str, Any]
MAX_PANELS = 3  # of one chart; more temperatures make more charts
ACCEPTANCE_LIMITS = (-0.03, 1.03)  # whole markers at 0 and 1
UNKNOWN: Estimate = {"value": None, "low": None, "high": None}


@dataclass(frozen=True)
class Point:
    """One value of a series."""

    x: float
    """Where it is on the x axis."""
    label: str
    """What x stands for, in words."""
    estimate: Estimate
    """The value, which may be unknown or without an interval."""


@dataclass(frozen=True)
class Series:
    """One line with markers."""

    key: SeriesKey
    """Verification and draft sampling, from which colour and marker follow."""
    label: str
    """Its name in the legend."""
    points: list[Point]
    """Its values, by ascending x."""
    detail: str = ""
    """A figure that belongs to it, as text."""

    @property
    def known(self) -> list[Point]:
        """The points that have a value."""
        return [p for p in self.points if p.estimate["value"] is not None]


@dataclass(frozen=True)
class Line:
    """A line without markers: an expectation, a limit, or one of many."""

    label: str
    """Its name in the legend."""
    xs: list[float]
    """x of its points."""
    ys: list[float]
    """y of its points."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    """What it is about."""
    series: list[Series]
    """The lines with markers."""
    guide: Line | None = None
    """A line to compare with."""
    background: tuple[Line, ...] = ()
    """Lines that together show a spread."""


@dataclass(frozen=True)
class Chart:
    """One chart of a report."""

    name: str
    """A name that no other chart of the report has."""
    title: str
    """The chart's heading."""
    x_label: str
    """What the x axis shows."""
    y_label: str
    """What the y axis shows."""
    panels: list[Panel]
    """One panel per temperature."""
    notes: tuple[str, ...] = ()
    """Sentences below the chart."""
    limits: tuple[float | None, float | None] = (None, None)
    """Limits of the y axis; None where the data decide."""
    ticks: tuple[tuple[float, str], ...] = ()
    """Marks of the x axis with their labels; none where x is a quantity."""
    dodge: float = 0.0
    """Distance between series at the same x."""

    @property
    def alt(self) -> str:
        """The chart in words: the first value of every series, and its last where there are several."""
        parts = [f"Chart: {self.title}; {self.y_label} by {self.x_label}."]
        for panel in self.panels:
            for series in panel.series:
                known = series.known
                ends = known[:1] if len(known) == 1 else [known[0], known[-1]]
                values = ", ".join(f"{estimate_text(p.estimate, '.3g')} at {p.label}" for p in ends)
                detail = f" ({series.detail})" if series.detail else ""
                parts.append(f"{panel.title}, {series.label}{detail}: {values}.")
        return " ".join(parts)


@dataclass(frozen=True)
class Charts:
    """The charts of a report."""

    charts: list[Chart]
    """The charts that have data."""
    missing: list[str]
    """A sentence for each chart that could not be drawn: why."""


def build_charts(document: dict[str, Any]) -> Charts:
    """Returns all charts for which `document` has data, in the order of a report."""
    drafting = [c for c in document["cells"] if speculative(c)]
    found = [
        *_speedup_charts(drafting),
        _position_chart(drafting, "conditional", "acceptance, drafts before it accepted"),
        _position_chart(drafting, "unconditional", "acceptance of it and all before"),
        _calibration_chart(drafting),
        _bin_chart(
            drafting, "by_output_position", "Acceptance of draft 1 by position in the output",
            "tokens since the prompt", "acceptance of draft 1", _whole_limits_text,
        ),
        _bin_chart(
            drafting, "by_entropy", "Acceptance by entropy of the target", "entropy of the target's distribution, nats",
            "acceptance of drafts reached", _limits_text,
        ),
        _experts_chart(document["experts"]),
    ]  # fmt: skip
    charts = [part for chart in found if chart.panels for part in _split(chart)]
    return Charts(charts, [f"{chart.title}: no data." for chart in found if not chart.panels])


def _split(chart: Chart) -> Iterable[Chart]:
    """Splits a chart into charts of at most `MAX_PANELS` panels; the notes go with the last one."""
    parts = [chart.panels[i : i + MAX_PANELS] for i in range(0, len(chart.panels), MAX_PANELS)]
    if len(parts) == 1:
        return [chart]
    split = [replace(chart, name=f"{chart.name}-{i}", panels=panels, notes=()) for i, panels in enumerate(parts, 1)]
    return [*split[:-1], replace(split[-1], notes=chart.notes)]


def _temperatures(cells: list[Cell]) -> list[float]:
    return sorted({c["temperature"] for c in cells})


def _keys(cells: list[Cell]) -> list[SeriesKey]:
    return sorted({series_key(c) for c in cells}, key=series_order)


def _speedup_charts(cells: list[Cell]) -> list[Chart]:
    """Returns one chart per batch size, with one point per K."""
    charts = []
    for batch_size in sorted({c["batch_size"] for c in cells}):
        here = [c for c in cells if c["batch_size"] == batch_size]
        lengths = sorted({c["num_speculative_tokens"] for c in here})
        panels: list[Panel] = []
        notes: list[str] = []
        for temperature in _temperatures(here):
            series = _speedup_series([c for c in here if c["temperature"] == temperature])
            guide = Line("plain decoding", [lengths[0] - 0.5, lengths[-1] + 0.5], [1.0, 1.0])
            _add_panel(panels, notes, temperature, series, guide)
        chart = Chart(
            f"speedup-batch-{batch_size}", f"Speed-up over plain decoding, batch size {batch_size}",
            "K, drafts per verification", "times plain decoding", panels, tuple(notes),
            ticks=tuple((k, str(k)) for k in lengths), dodge=0.12,
        )  # fmt: skip
        charts.append(chart)
    return charts


def _speedup_series(cells: list[Cell]) -> list[Series]:
    series = []
    for key in _keys(cells):
        line = sorted((c for c in cells if series_key(c) == key), key=lambda c: c["num_speculative_tokens"])
        lengths = [c["num_speculative_tokens"] for c in line]
        points = [Point(k, f"K = {k}", c["all"]["speedup"]) for k, c in zip(lengths, line)]
        series.append(Series(key, rule_label(line[0]), points))
    return series


def _add_panel(
    panels: list[Panel], notes: list[str], temperature: float, series: list[Series], guide: Line | None = None
) -> None:
    """Adds a panel of the series that have a value, if any; a note names each of the others."""
    title = f"temperature {temperature:g}"
    known = [s for s in series if s.known]
    notes += [f"Left out, no data: {title}, {s.label}." for s in series if not s.known]
    if known:
        panels.append(Panel(title, known, guide))


def _has_value(points: list[Point]) -> bool:
    return any(p.estimate["value"] is not None for p in points)


def _acceptance_panels(
    cells: list[Cell],
    points_of: Callable[[Cell], list[Point]],
    guide: Line | None = None,
    detail_of: Callable[[Cell], str] = lambda _: "",
) -> tuple[list[Panel], tuple[str, ...]]:
    """Returns one panel per temperature, with one series per rule of the cell that stands for it, and notes that say
    which cells these are."""
    panels: list[Panel] = []
    notes: list[str] = []
    shown: dict[tuple[int, int], list[str]] = {}
    for temperature in _temperatures(cells):
        series = []
        for key in _keys(here := [c for c in cells if c["temperature"] == temperature]):
            cell = _representative([c for c in here if series_key(c) == key], points_of)
            points = points_of(cell)
            series.append(Series(key, rule_label(cell), points, detail_of(cell)))
            if _has_value(points):
                at = cell["num_speculative_tokens"], cell["batch_size"]
                shown.setdefault(at, []).append(f"temperature {temperature:g}, {rule_label(cell)}")
        _add_panel(panels, notes, temperature, series, guide)
    for (k, batch_size), names in shown.items():
        which = "" if len(shown) == 1 else f" ({'; '.join(names)})"
        notes.insert(0, f"Shown: K = {k}, batch size {batch_size}{which}.")
    return panels, tuple(notes)


def _representative(cells: list[Cell], points_of: Callable[[Cell], list[Point]]) -> Cell:
    """Returns the cell that stands for a rule: one with data if any has them, then the largest K, then the smallest
    batch."""
    return max(cells, key=lambda c: (_has_value(points_of(c)), c["num_speculative_tokens"], -c["batch_size"]))


def _position_chart(cells: list[Cell], metric: str, y_label: str) -> Chart:
    def points_of(cell: Cell) -> list[Point]:
        return [Point(i, f"draft {i}", e) for i, e in enumerate(cell["all"][metric], 1)]

    panels, notes = _acceptance_panels(cells, points_of)
    last = max((len(c["all"][metric]) for c in cells), default=0)
    return Chart(
        f"acceptance-{metric}", f"{metric.capitalize()} acceptance by draft position", "draft position",
        y_label, panels, notes, limits=(None, ACCEPTANCE_LIMITS[1]),
        ticks=tuple((i, str(i)) for i in range(1, last + 1)), dodge=0.08,
    )  # fmt: skip


def _calibration_chart(cells: list[Cell]) -> Chart:
    """Returns the chart of measured acceptance against the probability with which the rule accepts, given both
    distributions."""

    def points_of(cell: Cell) -> list[Point]:
        return [
            Point(_middle(b) if b["mean"] is None else b["mean"], f"expected {_limits_text(b)}", b["acceptance"])
            for b in cell["by_expected_acceptance"]["bins"]
        ]

    def detail_of(cell: Cell) -> str:
        return f"ECE {format_number(cell['by_expected_acceptance']['ece']['value'], '.3f') or 'unknown'}"

    panels, notes = _acceptance_panels(cells, points_of, Line("as expected", [0, 1], [0, 1]), detail_of)
    return Chart(
        "calibration", "Calibration: measured against expected acceptance",
        "acceptance expected from both distributions", "measured acceptance of drafts reached", panels, notes,
        limits=ACCEPTANCE_LIMITS,
    )  # fmt: skip


def _bin_chart(
    cells: list[Cell], field: str, title: str, x_label: str, y_label: str, limits_text: Callable[[Bin], str]
) -> Chart:
    bins: dict[tuple[float, float | None], str] = {}  # in ascending order, those with drafts in any cell
    for cell in cells:
        bins |= {(b["low"], b["high"]): limits_text(b) for b in cell[field] if b["num_drafts"] > 0}
    limits = sorted(bins, key=lambda b: b[0])

    def points_of(cell: Cell) -> list[Point]:
        estimates = {(b["low"], b["high"]): b["acceptance"] for b in cell[field]}
        return [Point(i, bins[b], estimates.get(b, UNKNOWN)) for i, b in enumerate(limits)]

    panels, notes = _acceptance_panels(cells, points_of)
    name = "acceptance-" + field.replace("_", "-")
    ticks = tuple((i, bins[b].replace(" to ", "\N{EN DASH}")) for i, b in enumerate(limits))
    return Chart(
        name, title, x_label, y_label, panels, notes, limits=(None, ACCEPTANCE_LIMITS[1]), ticks=ticks, dodge=0.1
    )


def _limits_text(b: Bin) -> str:
    return f"{b['low']:g} or more" if b["high"] is None else f"{b['low']:g} to {b['high']:g}"


def _whole_limits_text(b: Bin) -> str:
    """Returns the limits of a bin of whole numbers as text; the upper limit itself is not in the bin."""
    return f"{b['low']:g} or more" if b["high"] is None else f"{b['low']:g} to {b['high'] - 1:g}"


def _middle(b: Bin) -> float:
    return float(b["low"] if b["high"] is None else (b["low"] + b["high"]) / 2)


def _experts_chart(experts: dict[str, Any] | None) -> Chart:
    title = "Distinct experts by number of verified tokens"
    chart = Chart("experts", title, "tokens of one forward", "distinct experts per layer", [], limits=(0.0, None))
    mean = [] if experts is None else experts["mean"]
    points = [Point(p["num_tokens"], f"{p['num_tokens']} tokens", p["measured"]) for p in mean]
    if experts is None or not _has_value(points):
        return chart
    guide = Line("E (1 - (1 - k/E)^t)", [p["num_tokens"] for p in mean], [p["expected"] for p in mean])
    layers = []
    for layer in experts["layers"]:
        known = [p for p in layer["points"] if p["measured"]["value"] is not None]
        xs, ys = [p["num_tokens"] for p in known], [p["measured"]["value"] for p in known]
        layers.append(Line("each layer", xs, ys))
    name = f"E = {experts['num_experts']} experts, k = {experts['experts_per_token']} per token"
    series = Series(("experts", ""), "measured, mean over layers", points)
    return replace(chart, panels=[Panel(name, [series], guide, tuple(layers))])
