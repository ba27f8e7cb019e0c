"""A `Prediction` and its `Validation` as tables for people and as JSON for machines."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from specdec.eval.files import finite
from specdec.eval.prediction.predict import Cell, Prediction, assumptions
from specdec.eval.prediction.validation import LARGE_ERROR, SPEEDUP, TOKENS_PER_S, Check, MedianErrors, Validation

SCHEMA = 1


def as_json(prediction: Prediction, validation: Validation) -> dict[str, Any]:
    """Version `SCHEMA`, strict JSON; see docs/json.md."""
    options = asdict(prediction.options)
    options["batch_sizes"], options["draft_lengths"] = prediction.batch_sizes, prediction.draft_lengths
    document: dict[str, Any] = finite(
        {
            "schema": SCHEMA,
            "options": options,
            "cells": [_cell_as_json(prediction, cell) for cell in prediction.cells],
            "best_draft_length": {str(b): prediction.best(b).num_draft_tokens for b in prediction.batch_sizes},
            "memory": {str(b): asdict(memory) for b, memory in prediction.memory.items()},
            "constants": asdict(prediction.model.constants),
            "assumptions": assumptions(prediction),
            "warnings": prediction.warnings,
            "validation": validation_as_json(validation),
        }
    )
    return document


def _cell_as_json(prediction: Prediction, cell: Cell) -> dict[str, Any]:
    iteration = cell.iteration
    return {
        "batch_size": cell.batch_size,
        "num_speculative_tokens": cell.num_draft_tokens,
        "mean_acceptance_length": cell.mean_acceptance_length,
        "tokens_per_s": cell.tokens_per_s,
        "tokens_per_s_per_request": cell.tokens_per_s_per_request,
        "speedup": cell.speedup,
        "iteration_s": iteration.total_s,
        "target_s": asdict(iteration.target) | {"total": iteration.target.total},
        "draft_extend_s": iteration.extend_s,
        "draft_steps_s": iteration.steps_s,
        "is_beyond_points": cell.is_beyond_points,
        "is_best": cell == prediction.best(cell.batch_size),
    }


def validation_as_json(validation: Validation) -> dict[str, Any]:
    medians = {
        "all": validation.median_errors(),
        "without_assumed_conditions": validation.median_errors(known_only=True),
        "tokens_per_s": validation.median_errors(TOKENS_PER_S),
        "speedup": validation.median_errors(SPEEDUP),
    }
    return {
        "median_absolute_relative_error": {name: m and asdict(m) for name, m in medians.items()},
        "fitted": asdict(validation.fitted),
        "fitted_without_source": {source: asdict(c) for source, c in validation.without_source.items()},
        "checks": [_check_as_json(check) for check in validation.checks],
        "not_covered": validation.not_covered,
    }


def _check_as_json(check: Check) -> dict[str, Any]:
    point = check.point
    return {
        "source": point.source,
        "engine": point.engine,
        "model": point.model,
        "precision": point.precision.name,
        "machine": str(point.machine),
        "batch_size": point.batch_size,
        "num_speculative_tokens": point.num_draft_tokens,
        "mean_acceptance_length": point.length,
        "context_length": point.context_length,
        "quantity": check.quantity,
        "measured": check.measured,
        "predicted": check.predicted,
        "predicted_without_point": check.without_point,
        "predicted_without_source": check.without_source,
        "in_fit": point.in_fit,
        "conditions": point.conditions,
        "missed_because": point.reason if check.is_missed else None,
    }


def print_report(prediction: Prediction, validation: Validation, out: Console) -> None:
    print_prediction(prediction, out)
    print_validation(validation, out)


def print_prediction(prediction: Prediction, out: Console) -> None:
    model, o = prediction.model, prediction.options
    largest = prediction.memory[prediction.batch_sizes[-1]]
    out.print(
        f"Predicted, not measured: {model.shape.name}, {model.precision.name}, {model.machine}, {o.context_length} "
        "tokens in every sequence",
        soft_wrap=True,
    )
    out.print(_rates_table(prediction))
    out.print(_best_table(prediction))
    out.print(
        f"Memory of one GPU: {largest.weights / 1e9:.1f} GB of weights, at the largest batch "
        f"{largest.kv_cache / 1e9:.1f} GB of keys and values, of {largest.available / 1e9:.1f} GB",
        soft_wrap=True,
    )
    for warning in prediction.warnings:
        out.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    out.print("Assumptions:")
    for sentence in assumptions(prediction):
        out.print(f"- {sentence}", soft_wrap=True, markup=False)


def _rates_table(prediction: Prediction) -> Table:
    """Batch sizes down, draft lengths across; the best of a row in bold, with a star."""
    table = _table("Tokens/s; * best, ? not validated", "batch")
    for k in prediction.draft_lengths:
        table.add_column(f"K = {k}", justify="right")
    for b in prediction.batch_sizes:
        best = prediction.best(b)
        cells = [cell for cell in prediction.cells if cell.batch_size == b]
        table.add_row(str(b), *(_rate(cell, is_best=cell == best) for cell in cells))
    return table


def _rate(cell: Cell, *, is_best: bool) -> str:
    text = f"{cell.tokens_per_s:.0f}{'?' if cell.is_beyond_points else ' '}{'*' if is_best else ' '}"
    return f"[bold]{text}[/bold]" if is_best else text


def _best_table(prediction: Prediction) -> Table:
    table = _table(
        "With the best K", "batch", "K", "accepted length", "tokens/s", "per request", "x plain", "ms/iteration",
        "verification", "drafting", "bound by",
    )  # fmt: skip
    for b in prediction.batch_sizes:
        cell = prediction.best(b)
        iteration = cell.iteration
        table.add_row(
            str(b),
            str(cell.num_draft_tokens),
            f"{cell.mean_acceptance_length:.2f}",
            f"{cell.tokens_per_s:.0f}",
            f"{cell.tokens_per_s_per_request:.1f}",
            f"{cell.speedup:.2f}",
            f"{iteration.total_s * 1e3:.2f}",
            f"{iteration.target.total * 1e3:.2f}",
            f"{(iteration.extend_s + iteration.steps_s) * 1e3:.2f}",
            _bound(cell),
        )
    return table


def _bound(cell: Cell) -> str:
    """What takes the largest share of the target forward."""
    target = cell.iteration.target
    shares = {
        "reading" if target.reading >= target.arithmetic else "arithmetic": max(target.reading, target.arithmetic),
        "latency": target.latency,
        "all-reduces": target.all_reduces,
    }
    name = max(shares, key=lambda part: shares[part])
    return f"{name} ({shares[name] / target.total:.0%})"


def print_validation(validation: Validation, out: Console) -> None:
    out.print(_checks_table(validation))
    medians = (
        ("figures", validation.median_errors()),
        ("figures without an assumed condition", validation.median_errors(known_only=True)),
        ("tokens/s", validation.median_errors(TOKENS_PER_S)),
        ("speed-ups", validation.median_errors(SPEEDUP)),
    )
    for name, errors in medians:
        if errors is not None:
            out.print(_median_sentence(name, errors), soft_wrap=True)
    out.print(_range_sentence(validation), soft_wrap=True)
    for check in validation.missed:
        out.print(_missed_sentence(check), style="yellow", soft_wrap=True, markup=False)
    for source, reason in validation.not_covered.items():
        out.print(f"not covered: {source}: {reason}", style="dim", soft_wrap=True, markup=False)


def _checks_table(validation: Validation) -> Table:
    table = _table(
        "Published measurements; ~: a condition is assumed; unseen: with constants fitted to other sources only",
        "engine", "model, GPUs", "batch", "K", "length", "figure", "published", "predicted", "error", "unseen",
    )  # fmt: skip
    for check in validation.checks:
        point = check.point
        table.add_row(
            point.engine,
            f"{point.model} {point.precision.name}, {point.machine}",
            str(point.batch_size),
            str(point.num_draft_tokens),
            f"{point.length:.2f}",
            f"{'' if point.in_fit else '~ '}{check.quantity}",
            f"{check.measured:.4g}",
            f"{check.predicted:.4g}",
            f"{check.error(check.predicted):+.0%}",
            f"{check.error():+.0%}",
            style="yellow" if check.is_missed else None,
        )
    return table


def _median_sentence(name: str, errors: MedianErrors) -> str:
    return (
        f"Median error of {errors.num_checks} {name}: {errors.without_source:.1%} with constants fitted to other "
        f"sources only (signed: {errors.bias:+.1%}); to all other points {errors.without_point:.1%}; to all, as in "
        f"use, {errors.fitted:.1%}"
    )


def _range_sentence(validation: Validation) -> str:
    shares = [c.bandwidth_share for c in validation.without_source.values()]
    layers = [c.layer_s * 1e6 for c in validation.without_source.values()]
    return (
        f"Fitted without one source, the bandwidth share is from {min(shares):.0%} to {max(shares):.0%}, the time of "
        f"a layer from {min(layers):.0f} to {max(layers):.0f} us"
    )


def _missed_sentence(check: Check) -> str:
    point = check.point
    text = (
        f"missed by more than {LARGE_ERROR:.0%}: {point.engine}, {point.model}, {point.machine}, batch "
        f"{point.batch_size}, K = {point.num_draft_tokens}, {check.quantity} {check.error():+.0%}: "
        f"{point.reason or 'not explained'}"
    )
    return f"{text}. Conditions: {point.conditions} ({point.source})"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table
