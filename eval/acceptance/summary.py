"""Sums a results document up: the best settings, the failed checks; and writes its values."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, get_args

from specdec.config import VerificationRule

RULES = get_args(VerificationRule)
Cell = dict[str, Any]
SeriesKey = tuple[str, str]  # verification, draft sampling
Estimate = dict[str, float | None]


@dataclass(frozen=True)
class Section:
    """The cells of one temperature and batch size."""

    temperature: float
    """Their temperature."""
    batch_size: int
    """Their batch size."""
    cells: list[Cell]
    """The cells: plain decoding first, then by rule, drafts and K."""

    @property
    def name(self) -> str:
        """Temperature and batch size in words."""
        return f"temperature {self.temperature:g}, batch size {self.batch_size}"

    @property
    def best(self) -> Cell | None:
        """The speculative cell with the largest speed-up, or else, where nothing plain was run, with the largest mean
        acceptance length."""
        for metric in ("speedup", "mean_acceptance_length"):
            known = [c for c in self.cells if speculative(c) and c["all"][metric]["value"] is not None]
            if known:
                return max(known, key=lambda c: c["all"][metric]["value"])
        return None

    @property
    def verdict(self) -> str:
        """One sentence: which K is best, and by how much."""
        if self.best is None:
            return "no draft was verified."
        setting, speedup = _setting(self.best), self.best["all"]["speedup"]
        if speedup["value"] is None:
            length = estimate_text(self.best["all"]["mean_acceptance_length"], ".2f")
            return f"no plain decoding to compare with; {setting} gets furthest, {length} tokens per verification."
        factor = f"{estimate_text(speedup, '.2f', '95 % interval ')} times the speed of plain decoding"
        low, high = _limits(speedup)
        if low > 1:
            return f"{setting} is best, {factor}."
        if high < 1:
            return f"plain decoding is faster than the best speculation, {setting}, which reaches {factor}."
        if self._surest is None:
            return f"no K is clearly faster than plain decoding; the best, {setting}, reaches {factor}."
        surest = f"{_setting(self._surest)}, {estimate_text(self._surest['all']['speedup'], '.2f')}, is the surest gain"
        return f"{setting} is best by its value, {factor}; {surest}."

    @property
    def warning(self) -> str:
        """One sentence about the cells whose outputs end in loops; empty without such."""
        shares = [c["all"]["final_loop_share"]["value"] for c in self.cells if c["warnings"]]
        if not shares:
            return ""
        low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
        return (
            f"in {len(shares)} of {len(self.cells)} cells {low if low == high else f'{low} to {high}'} of the output "
            "tokens lie in final loops: acceptance and speed-up there are those of repeating text."
        )

    @property
    def _surest(self) -> Cell | None:
        """The cell with the largest lower limit, if that is a gain."""
        known = [c for c in self.cells if speculative(c) and c["all"]["speedup"]["value"] is not None]
        gains = [c for c in known if _limits(c["all"]["speedup"])[0] > 1]
        return max(gains, key=lambda c: _limits(c["all"]["speedup"])[0], default=None)


def _setting(cell: Cell) -> str:
    return f"K = {cell['num_speculative_tokens']} with {rule_name(cell)}"


def _limits(estimate: Estimate) -> tuple[float, float]:
    """Returns the limits of the interval; without one, the value twice."""
    low, high = (estimate["value"] if estimate[name] is None else estimate[name] for name in ("low", "high"))
    assert low is not None
    assert high is not None
    return low, high


def sections(document: dict[str, Any]) -> list[Section]:
    """Returns the cells of a document by temperature, then batch size."""

    def place(cell: Cell) -> tuple[float, int]:
        return cell["temperature"], cell["batch_size"]

    def order(cell: Cell) -> tuple[Any, ...]:
        return *place(cell), speculative(cell), series_order(series_key(cell)), cell["num_speculative_tokens"]

    cells = sorted(document["cells"], key=order)
    return [Section(*at, list(group)) for at, group in groupby(cells, key=place)]


def speculative(cell: Cell) -> bool:
    """Returns whether a cell drafts."""
    return bool(cell["num_speculative_tokens"] > 0)


def series_key(cell: Cell) -> SeriesKey:
    """Returns a cell's verification and draft sampling."""
    return cell["verification"], cell["draft_sampling"]


def series_order(key: SeriesKey) -> tuple[int, SeriesKey]:
    """Returns what to sort series by: rules in the order of `RULES`, greedy verification and unknown rules before
    them."""
    return RULES.index(key[0]) if key[0] in RULES else -1, key


def rule_label(cell: Cell) -> str:
    """Returns "plain", "coupled", "coupled, greedy drafts" or the like; at temperature 0 everything is greedy."""
    if not speculative(cell):
        return "plain"
    verification, drafts = series_key(cell)
    return verification + (", greedy drafts" if drafts == "greedy" != verification else "")


def rule_name(cell: Cell) -> str:
    """Returns "plain decoding", "coupled verification", "coupled verification of greedy drafts" or the like."""
    label, *drafts = rule_label(cell).split(", ", 1)
    return f"{label} {'verification' if speculative(cell) else 'decoding'}" + "".join(f" of {d}" for d in drafts)


def cell_name(cell: Cell) -> str:
    """Returns all settings of a cell in words."""
    k = f", K = {cell['num_speculative_tokens']}" if speculative(cell) else ""
    return f"temperature {cell['temperature']:g}, batch size {cell['batch_size']}, {rule_name(cell)}{k}"


def failed_checks(document: dict[str, Any]) -> list[Cell]:
    """Returns the cells whose acceptance is not what the model's own distributions say."""
    return [c for c in document["cells"] if c["check"] is not None and not c["check"]["passed"]]


def check_verdict(document: dict[str, Any]) -> str:
    """Returns one sentence about all checks."""
    checked = [c for c in document["cells"] if c["check"] is not None]
    failed = failed_checks(document)
    if not checked:
        return "Acceptance was not checked against the model's own distributions."
    if failed:
        return f"{len(failed)} of {len(checked)} checks against the model's own distributions FAILED."
    return f"All {len(checked)} checks of acceptance against the model's own distributions passed."


def estimate_text(estimate: Estimate, form: str, interval: str = "") -> str:
    """Returns an estimate as "1.93 (1.88 to 1.98)"; empty where there is no value.

    form: how numbers are written, as `format` takes it.
    interval: words before the limits.
    """
    value, limits = format_number(estimate["value"], form), interval_text(estimate, form)
    return f"{value} ({interval}{limits})" if limits else value


def interval_text(estimate: Estimate, form: str) -> str:
    """Returns an estimate's interval as "1.88 to 1.98"; empty where there is none."""
    low, high = format_number(estimate["low"], form), format_number(estimate["high"], form)
    return f"{low} to {high}" if low and high else ""


def format_number(value: float | None, form: str) -> str:
    """Returns a number as text; empty for None."""
    return "" if value is None else format(value, form)
