"""Compares two results.json of `specdec eval acceptance`, A and B: what differs, whether that is real, whether B is
worse.

Cells are the same where temperature, rule, drafts, K and batch size are; their mean acceptance length, conditional
acceptances and speed-up are compared, of all requests together. Plain decoding has none of these. Where A and B have
other drafters, sampled drafts of the one are compared with greedy ones of the other, for want of the same ones.

**Intervals.** Both have the same prompts, which differ from each other more than anything else does: what is easy for A
is easy for B. So differences are taken prompt by prompt, from the counts in results.json, and the prompts are the
clusters of the interval (`specdec.eval.acceptance.intervals.paired_differences`). Where that cannot be done (a file of
an earlier release without counts, other prompts, a figure that fewer than two prompts inform about) errors are combined
as if both were independent (MOVER: Zou and Donner 2008): B - s A reaches down by
sqrt((b - b_low)^2 + s^2 (a_high - a)^2), up by sqrt((b_high - b)^2 + s^2 (a - a_low)^2). Such an interval is too wide
rather than too narrow. The comparison says which figures it is used for.

**Verdicts.** B may be worse by `tolerance` times A's value. Worse: the 95 % interval of B - (1 - tolerance) A lies
below 0: that is what fails. Uncertain: the value lies below 0 and its interval does not, or there is none to judge by;
that is said and fails nothing, as a failure at random would sooner teach to ignore failures. OK: the value does not.

**Power.** Every figure comes with the smallest loss that would have been called worse with a probability of 80 %
(`detectable_loss`): no verdict but "worse" says anything about losses below it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from specdec.eval.acceptance.by_prompt import acceptances, speedup
from specdec.eval.acceptance.intervals import NO_ESTIMATE, NORMAL, Estimate, paired_differences
from specdec.eval.acceptance.schema import SCHEMA, VERSION
from specdec.eval.acceptance.summary import cell_name, estimate_text, format_number

DEFAULT_TOLERANCE = 0.02
SETTINGS = ("temperature", "verification", "draft_sampling", "num_speculative_tokens", "batch_size")
NOT_THE_SAME_ANYWAY = (
    "model", "prompts", "num_speculative_tokens", "temperatures", "verification", "draft_sampling", "batch_sizes",
    "drafter",
)  # fmt: skip
LENGTH, SPEEDUP = "mean acceptance length", "speed-up"
NORMAL_80 = 0.841621  # 80 % quantile of the normal distribution
MACHINE = ("processor", "threads", "kernels", "weights")
Document = dict[str, Any]
Key = tuple[Any, ...]  # a cell's `SETTINGS`
Cells = dict[Key, dict[str, Any]]
Verdict = Literal["ok", "uncertain", "worse"]
STYLES: dict[Verdict, str] = {"ok": "", "uncertain": "yellow", "worse": "bold red"}


@dataclass(frozen=True)
class Difference:
    """One figure of a cell in A and B."""

    metric: str
    """The figure's name."""
    a: Estimate
    """The figure in A."""
    b: Estimate
    """The figure in B."""
    difference: Estimate
    """B - A."""
    paired: bool
    """Whether the interval of the difference comes from differences prompt by prompt."""
    real: bool | None
    """Whether the interval of the difference excludes 0; None without an interval."""
    verdict: Verdict
    """Whether B is worse."""
    detectable_loss: float | None
    """The loss that would have been found, see the function `detectable_loss`; None without an interval."""


@dataclass(frozen=True)
class CellComparison:
    """One cell in A and B."""

    settings: dict[str, Any]
    """The `SETTINGS` that the cell has in both documents, A's where drafters differ."""
    draft_sampling_in_b: str
    """Not that of the settings where drafts of the one are sampled and those of the other greedy."""
    differences: list[Difference]
    """Its figures."""


@dataclass(frozen=True)
class Comparison:
    """What A and B have in common, and what not."""

    tolerance: float
    """How much worse B may be, as a share of A's value."""
    cells: list[CellComparison]
    """The cells that both have."""
    only_in_a: list[dict[str, Any]]
    """Settings of cells that B lacks."""
    only_in_b: list[dict[str, Any]]
    """Settings of cells that A lacks."""
    warnings: list[str]
    """What else is not the same."""
    unpaired_because: str
    """Why no cell can be compared prompt by prompt; empty where the documents allow it."""

    @property
    def passed(self) -> bool:
        """Whether no figure is worse."""
        return self.count("worse") == 0

    @property
    def differences(self) -> list[Difference]:
        """The figures of all cells."""
        return [d for cell in self.cells for d in cell.differences]

    def count(self, verdict: Verdict) -> int:
        """Returns how many figures have this verdict."""
        return sum(d.verdict == verdict for d in self.differences)

    def detectable(self, metric: str) -> dict[str, float] | None:
        """Returns least, median and most of a metric's `detectable_loss` over the cells; None where no cell has one."""
        losses = [d.detectable_loss for d in self.differences if d.metric == metric and d.detectable_loss is not None]
        if not losses:
            return None
        return {"least": min(losses), "median": statistics.median(losses), "most": max(losses)}

    def as_dict(self) -> dict[str, Any]:
        """Returns a document for JSON, see docs/results.md."""
        detectable = {metric: self.detectable(metric) for metric in (LENGTH, SPEEDUP)}
        return {"passed": self.passed, **asdict(self), "detectable_losses": detectable}


def compare(document_a: Document, document_b: Document, tolerance: float = DEFAULT_TOLERANCE) -> Comparison:
    """Compares two documents of results.json.

    document_a: what to compare with.
    document_b: what must not be worse.
    tolerance: how much worse it may be, as a share of A's value.

    Raises ValueError for documents that cannot be compared: another schema, other prompts, no cell in common.
    """
    check_tolerance(tolerance)
    _refuse_what_differs(document_a, document_b)
    a, b = _cells(document_a, "A"), _cells(document_b, "B")
    common = _common(a, b, other_drafters=_drafter(document_a) != _drafter(document_b))
    if not common:
        raise ValueError("A and B have no cell with drafts in common: measure both with the same options")
    unpaired_because = _unpaired_because(document_a, document_b)
    return Comparison(
        tolerance,
        [
            CellComparison(
                _settings(a[of_a]),
                b[of_b]["draft_sampling"],
                list(_differences(a[of_a], b[of_b], tolerance, not unpaired_because)),
            )
            for of_a, of_b in common.items()
        ],
        [_settings(cell) for key, cell in a.items() if key not in common],
        [_settings(cell) for key, cell in b.items() if key not in common.values()],
        list(_warnings(document_a, document_b)),
        unpaired_because,
    )


def check_tolerance(tolerance: float) -> None:
    """Raises ValueError for a tolerance that is no share of A's value."""
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


def _unpaired_because(a: Document, b: Document) -> str:
    lacking = [name for name, document in (("A", a), ("B", b)) if "sha256" not in document["prompts"]]
    if lacking:
        return f"{' and '.join(lacking)} of an earlier release, without counts by prompt"
    if a["prompts"]["sha256"] != b["prompts"]["sha256"]:
        return "A and B have other prompts, though as many of each category"
    return ""


def _warnings(a: Document, b: Document) -> Iterator[str]:
    """Yields what is not the same and does not forbid to compare."""
    if a["prompts"]["name"] != b["prompts"]["name"]:
        yield f"prompt sets have other names: {_brief(a['prompts']['name'])} and {_brief(b['prompts']['name'])}"
    models = [document["provenance"]["checkpoint"] for document in (a, b)]
    if models[0]["sha256"] != models[1]["sha256"]:
        first, second = (f"{m['folder']} (sha256 {m['sha256'][:12]})" for m in models)
        yield f"other checkpoints: {first} and {second}"
    if _drafter(a) != _drafter(b):
        yield f"other drafters: {_drafter(a) or 'the MTP layer'} and {_drafter(b) or 'the MTP layer'}"
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


def _drafter(document: Document) -> str | None:
    """Returns the drafter that was given; None is the MTP layer."""
    drafter: str | None = document["options"].get("drafter")
    return drafter


def _common(a: Cells, b: Cells, *, other_drafters: bool) -> dict[Key, Key]:
    """Returns the cells to compare, A's key -> B's: the same settings, or else, of other drafters, the same but for
    drafts."""
    common = {key: key for key in a if key in b}
    if other_drafters:
        left = {_without_drafts(key): key for key in b if key not in common}
        common |= {key: left[_without_drafts(key)] for key in a if key not in common and _without_drafts(key) in left}
    return {key: common[key] for key in a if key in common}


def _without_drafts(key: Key) -> Key:
    return tuple(value for name, value in zip(SETTINGS, key) if name != "draft_sampling")


def _cells(document: Document, name: str) -> Cells:
    """Returns the cells with drafts, by their settings. name: the document's, "A" or "B"."""
    cells: Cells = {}
    for cell in document["cells"]:
        key = tuple(cell[setting] for setting in SETTINGS)
        if key in cells:
            raise ValueError(f"{name} has two cells of {cell_name(cell)}: make it anew with `specdec eval acceptance`")
        if cell["num_speculative_tokens"] > 0:
            cells[key] = cell
    return cells


def _settings(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: cell[name] for name in SETTINGS}


def _differences(a: dict[str, Any], b: dict[str, Any], tolerance: float, same_prompts: bool) -> Iterator[Difference]:
    """Yields the differences of metrics that either cell has."""
    metrics = [LENGTH, *(f"conditional acceptance {i}" for i in range(1, a["num_speculative_tokens"] + 1)), SPEEDUP]
    estimates = list(zip(_estimates(a["all"]), _estimates(b["all"])))
    shares = 1.0, 1 - tolerance
    unpaired = zip(*([minus(of_b, of_a, share) for of_a, of_b in estimates] for share in shares))
    paired = zip(*(_paired(a, b, share) for share in shares)) if same_prompts else repeat((NO_ESTIMATE, NO_ESTIMATE))
    for metric, (of_a, of_b), pair, other in zip(metrics, estimates, paired, unpaired):
        if of_a.value is None and of_b.value is None:
            continue
        is_paired = pair[0].low is not None
        difference, allowed = pair if is_paired else other
        real = None if difference.low is None or difference.high is None else difference.low > 0 or difference.high < 0
        loss = detectable_loss(allowed, of_a, tolerance)
        yield Difference(metric, of_a, of_b, difference, is_paired, real, _verdict(allowed), loss)


def _paired(a: dict[str, Any], b: dict[str, Any], share: float) -> list[Estimate]:
    """Returns B - share * A of a cell, prompt by prompt, in the order of `_estimates`; no estimates where a cell lacks
    counts of the same prompts."""
    counts, others = a.get("by_prompt"), b.get("by_prompt")
    if counts is None or others is None or counts["prompts"] != others["prompts"]:
        return [NO_ESTIMATE] * (a["num_speculative_tokens"] + 2)
    length, *conditional = paired_differences(acceptances(counts), acceptances(others), share)
    return [length.plus(1 - share), *conditional, *paired_differences(speedup(counts), speedup(others), share)]


def _estimates(group: dict[str, Any]) -> list[Estimate]:
    return [Estimate(**e) for e in (group["mean_acceptance_length"], *group["conditional"], group["speedup"])]


def minus(b: Estimate, a: Estimate, share: float = 1.0) -> Estimate:
    """Returns b - share * a, as if their errors were independent."""
    if a.value is None or b.value is None:
        return NO_ESTIMATE
    value = b.value - share * a.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Estimate(value, None, None)
    down = math.hypot(b.value - b.low, share * (a.high - a.value))
    up = math.hypot(b.high - b.value, share * (a.value - a.low))
    return Estimate(value, value - down, value + up)


def detectable_loss(allowed: Estimate, a: Estimate, tolerance: float) -> float | None:
    """Returns the smallest loss, as a share of A's value, that would have been called worse with a probability of 80 %.

    B is called worse where v + r < 0, v the value of B - (1 - tolerance) A and r the upper half of its 95 % interval,
    1.960 standard errors. With a loss of L, v is normal around (tolerance - L) A, so that the probability is 80 % where
    (L - tolerance) A = (1.960 + 0.842) standard errors: L = tolerance + (1 + 0.842 / 1.960) r / A. The standard error
    is taken to be that of A and B as they are. More than 1: not even a loss of everything would have been seen.

    allowed: B - (1 - tolerance) A.
    a: the figure in A.
    tolerance: how much worse B may be, as a share of A's value.
    """
    if allowed.value is None or allowed.high is None or not a.value:
        return None
    return tolerance + (1 + NORMAL_80 / NORMAL) * (allowed.high - allowed.value) / a.value


def _verdict(allowed: Estimate) -> Verdict:
    """Returns the verdict on a figure. allowed: B - (1 - tolerance) A."""
    if allowed.high is not None and allowed.high < 0:
        return "worse"
    return "ok" if allowed.value is not None and allowed.value >= 0 else "uncertain"


def print_comparison(comparison: Comparison, out: Console) -> None:
    """Prints warnings, a table per cell, and the verdict."""
    for warning in comparison.warnings:
        out.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    for cell in comparison.cells:
        out.print(_table(cell))
    for name, missing in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        for settings in missing:
            out.print(f"only in {name}: {cell_name(settings)}", style="yellow", soft_wrap=True, markup=False)
    for text in _method(comparison):
        out.print(text, style="yellow" if comparison.unpaired_because else "", soft_wrap=True, markup=False)
    worse, uncertain = comparison.count("worse"), comparison.count("uncertain")
    allowed = f"more than {comparison.tolerance:.1%} below A"
    if uncertain:
        text = f"{uncertain} uncertain: {allowed}, or without data, but not beyond chance. More prompts would tell."
        out.print(text, style="yellow", soft_wrap=True)
    verdict = (
        f"B is worse: {worse} of {len(comparison.differences)} figures {allowed}"
        if worse
        else f"no figure is surely {allowed}"
    )
    out.print(verdict, style="bold red" if worse else "bold green", soft_wrap=True)


def _method(comparison: Comparison) -> Iterator[str]:
    """Yields how intervals were made, and which losses they would have shown."""
    num_unpaired = sum(not d.paired for d in comparison.differences)
    if comparison.unpaired_because:
        yield f"unpaired intervals, wider than need be: {comparison.unpaired_because}"
    else:
        others = f"; {num_unpaired} figures that prompts say too little about are compared unpaired"
        yield "intervals are of differences prompt by prompt" + (others if num_unpaired else "")
    for metric in (LENGTH, SPEEDUP):
        losses = comparison.detectable(metric)
        if losses is not None:
            least, median, most = (_percent(losses[name]) for name in ("least", "median", "most"))
            yield f"with 80 % power it finds losses of {metric} from {median} on (median of cells; {least} to {most})"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share <= 1 else "over 100%"


def _table(cell: CellComparison) -> Table:
    name = cell_name(cell.settings)
    if cell.draft_sampling_in_b != cell.settings["draft_sampling"]:
        name += f" ({cell.settings['draft_sampling']} drafts in A, {cell.draft_sampling_in_b} in B)"
    table = Table(title=name[:1].upper() + name[1:], title_justify="left")
    for i, column in enumerate(("", "A", "B", "B - A", "real", "verdict", "finds")):
        table.add_column(column, justify="left" if i == 0 else "right")
    for d in cell.differences:
        a, b = (format_number(e.value, ".3f") for e in (d.a, d.b))
        change = estimate_text(asdict(d.difference), "+.3f")
        real = {True: "yes", False: "no", None: ""}[d.real]
        finds = "" if d.detectable_loss is None else _percent(d.detectable_loss)
        table.add_row(d.metric, a, b, change, real, d.verdict, finds, style=STYLES[d.verdict])
    return table
