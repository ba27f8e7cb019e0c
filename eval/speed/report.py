"""Writes a `SpeedReport` as tables for people and as JSON for machines."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from specdec.eval.speed.measure import Decoding, SpeedReport
from specdec.eval.speed.roofline import describe


def as_json(report: SpeedReport) -> dict[str, Any]:
    """Returns a document for JSON, see docs/json.md."""
    document = asdict(report)
    document["options"]["peers"] = [f"{p.name}={p.interpreter}" for p in report.options.peers]
    document["read_bandwidth_bytes_per_s"] = report.bandwidth
    for cell, entry in zip(report.decoding, document["decoding"]):
        entry["tokens_per_s"] = statistics.median(cell.rates)
        entry["fraction_of_bandwidth"] = fraction_of_bandwidth(report, cell)
    for prefill, entry in zip(report.prefill, document["prefill"]):
        entry["tokens_per_s"] = statistics.median(prefill.rates)
    return document


def fraction_of_bandwidth(report: SpeedReport, cell: Decoding) -> float | None:
    """Returns the least time that reading a step's bytes takes, over the time that the step took; None where the bytes
    are not known."""
    if cell.step_bytes is None:
        return None
    return cell.step_bytes / report.bandwidth / statistics.median(cell.step_s)


def print_report(report: SpeedReport, out: Console) -> None:
    """Prints a report as tables."""
    for key, value in report.machine.items():
        out.print(f"{key}: {value}", markup=False, soft_wrap=True)
    out.print(f"read bandwidth: {report.bandwidth / 1e9:.1f} GB/s")
    out.print(_decoding_table(report))
    if report.prefill:
        out.print(_prefill_table(report))
    if report.costs is not None:
        out.print(_cost_table(report))


def _decoding_table(report: SpeedReport) -> Table:
    o = report.options
    title = f"Decoding, {o.prompt_tokens}-token prompts, {o.max_tokens} tokens each, temperature {o.temperature:g}"
    table = _table(
        title, "engine", "batch", "K", "tokens/s (quartiles)", "x plain", "accepted length", "ms/step", "MB/step",
        "experts", "of bandwidth", "of predicted", "Python", "dispatch",
    )  # fmt: skip
    plain = {(c.engine, c.batch_size): statistics.median(c.rates) for c in report.decoding if c.num_draft_tokens == 0}
    for cell in report.decoding:
        low, median, high = describe(cell.rates)
        base = plain.get((cell.engine, cell.batch_size))
        fraction = fraction_of_bandwidth(report, cell)
        table.add_row(
            cell.engine,
            str(cell.batch_size),
            str(cell.num_draft_tokens),
            f"{median:.1f} ({low:.1f} to {high:.1f})",
            "" if base is None else f"{median / base:.2f}",
            _number(cell.mean_acceptance_length, ".2f"),
            _number(statistics.median(cell.step_s) * 1e3 if cell.step_s else None, ".2f"),
            _number(None if cell.step_bytes is None else cell.step_bytes / 1e6, ".1f"),
            _number(cell.distinct_experts, ".1f"),
            _number(fraction, ".0%"),
            _number(None if cell.predicted is None else median / cell.predicted, ".0%"),
            _number(cell.python_share, ".0%"),
            _number(cell.dispatch_share, ".1%"),
        )
    return table


def _prefill_table(report: SpeedReport) -> Table:
    table = _table("Prefill of one prompt", "engine", "tokens", "tokens/s (quartiles)")
    for cell in report.prefill:
        low, median, high = describe(cell.rates)
        table.add_row(cell.engine, str(cell.num_tokens), f"{median:.0f} ({low:.0f} to {high:.0f})")
    return table


def _cost_table(report: SpeedReport) -> Table:
    assert report.costs is not None
    table = _table("One forward", "rows", "target, ms", "MTP, ms")
    for rows, seconds in report.costs.target.items():
        mtp = report.costs.mtp_extend.get(rows)
        table.add_row(str(rows), f"{seconds * 1e3:.3f}", _number(None if mtp is None else mtp * 1e3, ".3f"))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
