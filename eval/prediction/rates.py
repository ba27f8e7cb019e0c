"""Acceptance by draft position: from results.json, or typed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from specdec.eval.acceptance.results import read_results

CONDITIONAL = "conditional:"
# Fields of a cell that its acceptance depends on, with the options that choose among them.
CHOICES = {"temperature": "--temperature", "verification": "--verification", "draft_sampling": "--draft-sampling"}


@dataclass(frozen=True)
class AcceptanceRates:
    """unconditional: A_1, A_2, ...: the probability that draft i is accepted, which it is only where those before it
    are. measured: how many of them were given; the others are extrapolated. source: for people."""

    unconditional: tuple[float, ...]
    source: str
    measured: int

    @classmethod
    def given(cls, unconditional: Iterable[float], source: str) -> AcceptanceRates:
        """ValueError unless they are probabilities that do not rise."""
        values = tuple(unconditional)
        if not values:
            raise ValueError(f"acceptance: {source} has no draft position")
        for position, value in enumerate(values, 1):
            if not 0 <= value <= 1:
                raise ValueError(f"acceptance: {value:g} at draft position {position} must be from 0 to 1")
            if position > 1 and value > values[position - 2]:
                raise ValueError(
                    f"acceptance: {value:g} at draft position {position} exceeds {values[position - 2]:g} at the one "
                    f"before; unconditional acceptance cannot rise (put {CONDITIONAL!r} before conditional values)"
                )
        return cls(values, source, len(values))

    def mean_length(self, num_draft_tokens: int) -> float:
        """tau(K) = 1 + A_1 + ... + A_K: tokens per iteration, the bonus token included."""
        return 1 + sum(self.unconditional[:num_draft_tokens])

    def extended(self, num_positions: int) -> AcceptanceRates:
        """At least so many positions: the last conditional acceptance goes on."""
        values = list(self.unconditional)
        before = [1.0, *values][-2]
        ratio = values[-1] / before if before > 0 else 0.0
        while len(values) < num_positions:
            values.append(values[-1] * ratio)
        return replace(self, unconditional=tuple(values))


def parse_acceptance(
    text: str, temperature: float | None = None, verification: str | None = None, draft_sampling: str | None = None
) -> AcceptanceRates:
    """`text` is a results.json (or its folder), or numbers with commas between them: unconditional acceptance A_i by
    draft position, as vLLM logs it ("per-position acceptance rate"); after "conditional:" alpha_i, given that the
    drafts before were accepted.

    The other arguments choose among the cells of a results.json. ValueError where they leave none or several kinds, and
    for numbers that are no such probabilities.
    """
    numbers = _numbers(text.removeprefix(CONDITIONAL))
    if numbers is None:
        return _from_results(Path(text), (temperature, verification, draft_sampling))
    if any(choice is not None for choice in (temperature, verification, draft_sampling)):
        raise ValueError(f"{', '.join(CHOICES.values())} choose among the cells of a results.json, {text!r} is none")
    if text.startswith(CONDITIONAL):
        _check_probabilities(numbers)
        return AcceptanceRates.given(accumulate(numbers, mul), f"given, {text}")
    return AcceptanceRates.given(numbers, f"given, unconditional {text}")


def _numbers(text: str) -> list[float] | None:
    """None where `text` is something else."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None


def _check_probabilities(values: list[float]) -> None:
    for position, value in enumerate(values, 1):
        if not 0 <= value <= 1:
            raise ValueError(f"acceptance: {value:g} at draft position {position} must be from 0 to 1")


def _from_results(path: Path, wanted: tuple[float | str | None, ...]) -> AcceptanceRates:
    """Of the cell with the most draft positions; among those that of the smallest batch, which changes nothing."""
    cells = [cell for cell in read_results(path)["cells"] if cell["num_speculative_tokens"] > 0]
    chosen = [c for c in cells if all(w is None or c[name] == w for name, w in zip(CHOICES, wanted))]
    if not chosen:
        raise ValueError(f"{path} has no cell with drafts of {_described(wanted)}; it has {_kinds(cells)}")
    if len({_kind(cell) for cell in chosen}) > 1:
        raise ValueError(
            f"{path} has several kinds of cells, {_kinds(chosen)}: choose with {', '.join(CHOICES.values())}"
        )
    cell = max(chosen, key=lambda c: (c["num_speculative_tokens"], -c["batch_size"]))
    values = []
    for estimate in cell["all"]["unconditional"]:
        if estimate["value"] is None:
            break
        values.append(estimate["value"])
    if not values:
        raise ValueError(f"{path}: nothing was drafted in the cell of {_described(_kind(cell))}")
    source = f"{path}, {_described(_kind(cell))}, K = {cell['num_speculative_tokens']}"
    return AcceptanceRates.given(_falling(values), source)


def _falling(values: list[float]) -> list[float]:
    """Positions have other denominators where drafts are cut off at an output's end, so one may rise by chance."""
    return list(accumulate(values, min))


def _kind(cell: dict[str, Any]) -> tuple[float | str, ...]:
    return tuple(cell[name] for name in CHOICES)


def _kinds(cells: list[dict[str, Any]]) -> str:
    kinds = sorted({_described(_kind(cell)) for cell in cells})
    return "; ".join(kinds) if kinds else "no cell with drafts"


def _described(values: tuple[float | str | None, ...]) -> str:
    named = [f"{name.replace('_', ' ')} {value}" for name, value in zip(CHOICES, values) if value is not None]
    return ", ".join(named) or "any kind"
