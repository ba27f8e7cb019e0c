"""Two results.json of `specdec eval acceptance`, A and B: what differs, whether that is real, whether B is worse.

Cells are the same where temperature, rule, drafts, K and batch size are; their mean acceptance length, conditional
acceptances and speed-up are compared, of all requests together. Plain decoding has none of these.

**Intervals.** A results.json has intervals, no requests, so errors are combined as if both were independent (MOVER:
Zou and Donner 2008): B - s A reaches down by sqrt((b - b_low)^2 + s^2 (a_high - a)^2), up by
sqrt((b_high - b)^2 + s^2 (a - a_low)^2). Both have the same prompts, which differ from each other more than anything
else does: what is easy for A is easy for B, so that their errors largely cancel and the intervals are too wide rather
than too narrow. What they call real, or worse, is so; more prompts find smaller differences.

**Verdicts.** B may be worse by `tolerance` times A's value. Worse: the 95 % interval of B - (1 - tolerance) A lies
below 0: that is what fails. Uncertain: the value lies below 0 and its interval does not, or there is none to judge by;
that is said and fails nothing, as a failure at random would sooner teach to ignore failures. OK: the value does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from specdec.eval.acceptance.intervals import NO_ESTIMATE, Estimate
from specdec.eval.acceptance.schema import SCHEMA, VERSION
from specdec.eval.acceptance.summary import cell_name, estimate_text, format_number

DEFAULT_TOLERANCE = 0.02
SETTINGS = ("temperature", "verification", "draft_sampling", "num_speculative_tokens", "batch_size")
NOT_THE_SAME_ANYWAY = (
    "model", "prompts", "num_speculative_tokens", "temperatures", "verification", "draft_sampling", "batch_sizes",
)  # fmt: skip
MACHINE = ("processor", "threads", "kernels", "weights")
Document = dict[str, Any]
Verdict = Literal["ok", "uncertain", "worse"]
STYLES: dict[Verdict, str] = {"ok": "", "uncertain": "yellow", "worse": "bold red"}


@dataclass(frozen=True)
class Difference:
    """difference: B - A. real: its interval excludes 0; None without an interval."""

    metric: str
    a: Estimate
    b: Estimate
    difference: Estimate
    real: bool | None
    verdict: Verdict


@dataclass(frozen=True)
class CellComparison:
    """settings: the `SETTINGS` that the cell has in both documents."""

    settings: dict[str, Any]
    differences: list[Difference]


@dataclass(frozen=True)
class Comparison:
    """only_in_a, only_in_b: settings of cells that the other document lacks. warnings: what else is not the same."""

    tolerance: float
    cells: list[CellComparison]
    only_in_a: list[dict[str, Any]]
    only_in_b: list[dict[str, Any]]
    warnings: list[str]

    @property
    def passed(self) -> bool:
        return self.count("worse") == 0

    def count(self, verdict: Verdict) -> int:
        return sum(d.verdict == verdict for cell in self.cells for d in cell.differences)

    def as_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def compare(document_a: Document, document_b: Document, tolerance: float = DEFAULT_TOLERANCE) -> Comparison:
    """ValueError for documents that cannot be compared: another schema, other prompts, no cell in common."""
    check_tolerance(tolerance)
    _refuse_what_differs(document_a, document_b)
    a, b = _cells(document_a, "A"), _cells(document_b, "B")
    common = [key for key in a if key in b]
    if not common:
        raise ValueError("A and B have no cell with drafts in common: measure both with the same options")
    return Comparison(
        tolerance,
        [CellComparison(_settings(a[key]), list(_differences(a[key], b[key], tolerance))) for key in common],
        [_settings(cell) for key, cell in a.items() if key not in b],
        [_settings(cell) for key, cell in b.items() if key not in a],
        list(_warnings(document_a, document_b)),
    )


def check_tolerance(tolerance: float) -> None:
    """ValueError for one that is no share of A's value."""
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance = {tolerance} must be at least 0 and below 1: 0.02 lets B be 2 % worse")


def _refuse_what_differs(a: Document, b: Document) -> None:
    for name, document in (("A", a), ("B", b)):
        schema, version = document.get("schema"), document.get("version")
        if (schema, version) != (SCHEMA, VERSION):
            raise ValueError(
                f"{name} is {schema!r}, version {version!r}, not {SCHEMA!r}, version {VERSION}: make it anew with "
                "`specdec eval acceptance` of this specdec"
            )
    for field in ("num_prompts", "categories"):
        of_a, of_b = a["prompts"][field], b["prompts"][field]
        if of_a != of_b:
            raise ValueError(
                f"A and B have other prompts: {field} {_brief(of_a)} and {_brief(of_b)}. Acceptance depends on the "
                "text: measure both with the same --prompts"
            )


def _warnings(a: Document, b: Document) -> Iterator[str]:
    """What is not the same and does not forbid to compare."""
    if a["prompts"]["name"] != b["prompts"]["name"]:
        yield f"prompt sets have other names: {_brief(a['prompts']['name'])} and {_brief(b['prompts']['name'])}"
    models = [document["provenance"]["checkpoint"] for document in (a, b)]
    if models[0]["sha256"] != models[1]["sha256"]:
        first, second = (f"{m['folder']} (sha256 {m['sha256'][:12]})" for m in models)
        yield f"other checkpoints: {first} and {second}"
    options = dict.fromkeys([*a["options"], *b["options"]])
    for name in options:
        if name not in NOT_THE_SAME_ANYWAY and a["options"].get(name) != b["options"].get(name):
            yield f"other options: {name} {_brief(a['options'].get(name))} and {_brief(b['options'].get(name))}"
    for name in MACHINE:
        of_a, of_b = a["provenance"][name], b["provenance"][name]
        if of_a != of_b:
            yield f"other {name}, and speed-ups depend on it: {of_a} and {of_b}"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _cells(document: Document, name: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Those with drafts, by their settings."""
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in document["cells"]:
        key = tuple(cell[setting] for setting in SETTINGS)
        if key in cells:
            raise ValueError(f"{name} has two cells of {cell_name(cell)}: make it anew with `specdec eval acceptance`")
        if cell["num_speculative_tokens"] > 0:
            cells[key] = cell
    return cells


def _settings(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: cell[name] for name in SETTINGS}


def _differences(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> Iterator[Difference]:
    """Of metrics that either cell has."""
    names = [f"conditional acceptance {i}" for i in range(1, a["num_speculative_tokens"] + 1)]
    metrics = ["mean acceptance length", *names, "speed-up"]
    for metric, of_a, of_b in zip(metrics, _estimates(a["all"]), _estimates(b["all"])):
        if of_a.value is None and of_b.value is None:
            continue
        difference, allowed = minus(of_b, of_a), minus(of_b, of_a, 1 - tolerance)
        real = None if difference.low is None or difference.high is None else difference.low > 0 or difference.high < 0
        yield Difference(metric, of_a, of_b, difference, real, _verdict(allowed))


def _estimates(group: dict[str, Any]) -> list[Estimate]:
    return [Estimate(**e) for e in (group["mean_acceptance_length"], *group["conditional"], group["speedup"])]


def minus(b: Estimate, a: Estimate, share: float = 1.0) -> Estimate:
    """b - share * a, as if their errors were independent."""
    if a.value is None or b.value is None:
        return NO_ESTIMATE
    value = b.value - share * a.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Estimate(value, None, None)
    down = math.hypot(b.value - b.low, share * (a.high - a.value))
    up = math.hypot(b.high - b.value, share * (a.value - a.low))
    return Estimate(value, value - down, value + up)


def _verdict(allowed: Estimate) -> Verdict:
    """allowed: B - (1 - tolerance) A."""
    if allowed.high is not None and allowed.high < 0:
        return "worse"
    return "ok" if allowed.value is not None and allowed.value >= 0 else "uncertain"


def print_comparison(comparison: Comparison, out: Console) -> None:
    for warning in comparison.warnings:
        out.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    for cell in comparison.cells:
        out.print(_table(cell))
    for name, missing in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        for settings in missing:
            out.print(f"only in {name}: {cell_name(settings)}", style="yellow", soft_wrap=True, markup=False)
    worse, uncertain = comparison.count("worse"), comparison.count("uncertain")
    allowed = f"more than {comparison.tolerance:.1%} below A"
    if uncertain:
        text = f"{uncertain} uncertain: {allowed}, or without data, but not beyond chance. More prompts would tell."
        out.print(text, style="yellow", soft_wrap=True)
    num_compared = sum(len(cell.differences) for cell in comparison.cells)
    verdict = f"B is worse: {worse} of {num_compared} figures {allowed}" if worse else f"no figure is surely {allowed}"
    out.print(verdict, style="bold red" if worse else "bold green", soft_wrap=True)


def _table(cell: CellComparison) -> Table:
    name = cell_name(cell.settings)
    table = Table(title=name[:1].upper() + name[1:], title_justify="left")
    for i, column in enumerate(("", "A", "B", "B - A", "real", "verdict")):
        table.add_column(column, justify="left" if i == 0 else "right")
    for d in cell.differences:
        a, b = (format_number(e.value, ".3f") for e in (d.a, d.b))
        change = estimate_text(asdict(d.difference), "+.3f")
        real = {True: "yes", False: "no", None: ""}[d.real]
        table.add_row(d.metric, a, b, change, real, d.verdict, style=STYLES[d.verdict])
    return table
