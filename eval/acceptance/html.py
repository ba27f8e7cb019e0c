"""Writes the report as one HTML file: no scripts, no network, charts as SVG in the page itself."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from specdec.eval.acceptance.charts import Chart, build_charts
from specdec.eval.acceptance.plots import draw
from specdec.eval.acceptance.summary import (
    Cell,
    Estimate,
    Section,
    cell_name,
    check_verdict,
    failed_checks,
    format_number,
    interval_text,
    rule_label,
    sections,
    speculative,
)
from specdec.eval.files import write_whole

NO_BREAK = "\N{NO-BREAK SPACE}"
REPORT_NAME, TEMPLATE_NAME = "report.html", "report.html.jinja"


@dataclass(frozen=True)
class Column:
    """One metric of a table."""

    metric: str
    """Its field in results.json."""
    heading: str
    """How the column is headed."""
    form: str
    """How its values are written, as `format` takes it."""
    factor: float = 1.0
    """What values are multiplied by to be in the unit shown."""

    def shown(self, group: dict[str, Any]) -> Shown:
        """Returns a group's value as text."""
        return _shown(group[self.metric], self.form, self.factor)


@dataclass(frozen=True)
class Shown:
    """An estimate as text."""

    value: str
    """The value; empty where it is unknown."""
    interval: str
    """The interval; empty where there is none."""


@dataclass(frozen=True)
class Row:
    """A group in a table of metrics."""

    name: str
    """The group's name."""
    metrics: list[Shown]
    """Its values, by column."""
    num_requests: int
    """How many requests it has."""
    best: bool = False
    """Whether it is to be marked as the best one."""


COLUMNS = (
    Column("speedup", "speed-up", ".2f"),
    Column("mean_acceptance_length", "mean acceptance length", ".2f"),
    Column("draft_efficiency", "draft efficiency", ".3f"),
    Column("block_efficiency", "block efficiency", ".2f"),
    Column("tokens_per_s_per_request", "tokens/s per request", ",.0f"),
    Column("tokens_per_s", "tokens/s in total", ",.0f"),
    Column("ttft_s", "time to first token, ms", ".1f", 1e3),
    Column("final_loop_share", "in final loops, %", ".0f", 100),
    Column("ece", "ECE", ".3f"),
)
CATEGORY_COLUMNS = tuple(c for c in COLUMNS if c.metric not in ("tokens_per_s", "block_efficiency", "ece"))
POSITION_ROWS = (("conditional", "conditional"), ("unconditional", "unconditional"), ("alpha", "overlap"))


def write_html(document: dict[str, Any], folder: Path) -> Path:
    """Writes report.html into `folder`, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REPORT_NAME
    write_whole(path, render_html(document))
    return path


def render_html(document: dict[str, Any]) -> str:
    """Returns the page. Every string of the document is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    charts, views = build_charts(document), [_section_view(s) for s in sections(document)]
    return environment.get_template(TEMPLATE_NAME).render(
        document=document,
        sections=views,
        warned=[view for view in views if view["warning"]],
        check_verdict=check_verdict(document),
        failed=[(cell_name(c), c["check"]["message"]) for c in failed_checks(document)],
        checked=[_check_view(c) for s in sections(document) for c in s.cells if c["check"] is not None],
        columns=COLUMNS,
        category_columns=CATEGORY_COLUMNS,
        charts=[_chart_view(chart) for chart in charts.charts],
        missing_charts=charts.missing,
        experts=_experts_view(document["experts"]),
        drafter=document["options"].get("drafter"),
        options={name: "not given" if value is None else _plain(value) for name, value in document["options"].items()},
        provenance=_flat(document["provenance"]),
    )


def _section_view(section: Section) -> dict[str, Any]:
    best = section.best
    return {
        "id": f"t{section.temperature:g}-b{section.batch_size}",
        "name": section.name,
        "verdict": section.verdict,
        "warning": section.warning,
        "rows": [_row(_setting(c), c["all"] | c["by_expected_acceptance"], COLUMNS, c is best) for c in section.cells],
        "draft_numbers": range(1, 1 + max(c["num_speculative_tokens"] for c in section.cells)),
        "positions": [row for c in section.cells if speculative(c) for row in _position_rows(c)],
        "best": None if best is None else _setting(best),
        "best_categories": [] if best is None else _category_rows(best),
        "categories": [(_setting(c), rows) for c in section.cells if (rows := _category_rows(c))],
    }


def _setting(cell: Cell) -> str:
    k = f"K{NO_BREAK}={NO_BREAK}{cell['num_speculative_tokens']}"
    return rule_label(cell) + (f", {k}" if speculative(cell) else "")


def _row(name: str, group: dict[str, Any], columns: tuple[Column, ...], best: bool = False) -> Row:
    return Row(name, [column.shown(group) for column in columns], group["num_requests"], best)


def _category_rows(cell: Cell) -> list[Row]:
    return [_row(name, group, CATEGORY_COLUMNS) for name, group in cell["categories"].items()]


def _position_rows(cell: Cell) -> list[tuple[str, str, list[Shown]]]:
    """Returns rows (setting, what it shows, values by draft position) of a cell; overlap is the sum of min(p, q)."""
    fields = cell["all"] | {"alpha": cell["alpha"]}
    return [(_setting(cell), name, [_shown(e, ".3f") for e in fields[field]]) for field, name in POSITION_ROWS]


def _check_view(cell: Cell) -> dict[str, Any]:
    return {"name": cell_name(cell), **cell["check"]}


def _chart_view(chart: Chart) -> dict[str, Any]:
    image = base64.b64encode(draw(chart)).decode("ascii")
    rows = [
        (panel.title, series.label, point.label, _shown(point.estimate, ".3f"))
        for panel in chart.panels
        for series in panel.series
        for point in series.known
    ]
    return {"chart": chart, "src": f"data:image/svg+xml;base64,{image}", "rows": rows}


def _experts_view(experts: dict[str, Any] | None) -> list[tuple[int, Shown, str]]:
    points = [] if experts is None else experts["mean"]
    return [(p["num_tokens"], _shown(p["measured"], ".2f"), format_number(p["expected"], ".2f")) for p in points]


def _shown(estimate: Estimate | None, form: str, factor: float = 1.0) -> Shown:
    if estimate is None:
        return Shown("", "")
    scaled = {name: None if value is None else value * factor for name, value in estimate.items()}
    return Shown(format_number(scaled["value"], form), interval_text(scaled, form))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns all values as text, those of nested objects by the name "outer inner"."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name} ") if isinstance(value, dict) else {name: _plain(value)}
    return flat


def _plain(value: Any) -> str:
    if value is None:
        return "unknown"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
