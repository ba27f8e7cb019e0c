"""How far predictions are from the published points, and the fit of the two constants to them.

A point that the fit has seen says little. So every point is predicted three times: with the constants as they are, with
those fitted to all other points, and with those fitted to the points of all other sources, which share no engine,
machine or method of measuring with it. The last error is the honest one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from specdec.eval.prediction.costs import Constants, CostModel
from specdec.eval.prediction.published import NOT_COVERED, POINTS, Point

LARGE_ERROR = 0.2
FIT_ROUNDS, LEAST_RESIDUAL = 100, 1e-3
TOKENS_PER_S, SPEEDUP = "tokens/s", "speed-up"


@dataclass(frozen=True)
class Check:
    """One published figure and its predictions: with the constants of `Constants`, with those fitted without the point,
    and with those fitted without its source."""

    point: Point
    quantity: str
    measured: float
    predicted: float
    without_point: float
    without_source: float

    def error(self, predicted: float | None = None) -> float:
        """Relative, positive where too much is predicted; without an argument, of the prediction without the source."""
        return (self.without_source if predicted is None else predicted) / self.measured - 1

    @property
    def is_missed(self) -> bool:
        return abs(self.error()) > LARGE_ERROR


@dataclass(frozen=True)
class MedianErrors:
    """Medians of absolute relative errors over `num_checks`, by what the fit has not seen; bias: the median of signed
    ones without the source, positive where too much is predicted."""

    num_checks: int
    fitted: float
    without_point: float
    without_source: float
    bias: float


@dataclass(frozen=True)
class Validation:
    """fitted: the constants that `fit` finds for all points, which those in use are rounded from. without_source: those
    that it finds for the points of all other sources, by source of the points that it sees."""

    constants: Constants
    fitted: Constants
    without_source: dict[str, Constants]
    checks: list[Check]
    not_covered: dict[str, str]

    @property
    def missed(self) -> list[Check]:
        return [check for check in self.checks if check.is_missed]

    def median_errors(self, quantity: str | None = None, known_only: bool = False) -> MedianErrors | None:
        """Of one quantity or all, of all points or those without assumed conditions; None where there is none."""
        checks = [
            c for c in self.checks
            if quantity in (None, c.quantity) and (c.point.in_fit or not known_only)
        ]  # fmt: skip
        if not checks:
            return None
        return MedianErrors(
            num_checks=len(checks),
            fitted=statistics.median(abs(c.error(c.predicted)) for c in checks),
            without_point=statistics.median(abs(c.error(c.without_point)) for c in checks),
            without_source=statistics.median(abs(c.error()) for c in checks),
            bias=statistics.median(c.error() for c in checks),
        )


def validate(points: Sequence[Point] = POINTS) -> Validation:
    sources = dict.fromkeys(p.source for p in points)
    without_source = {source: fit([p for p in points if p.source != source]) for source in sources}
    checks = []
    for point in points:
        others, elsewhere = fit([p for p in points if p is not point]), without_source[point.source]
        for quantity, measured in ((TOKENS_PER_S, point.tokens_per_s), (SPEEDUP, point.speedup)):
            if measured is not None:
                predictions = (_predicted(point, quantity, c) for c in (Constants(), others, elsewhere))
                checks.append(Check(point, quantity, measured, *predictions))
    seen = {p.source for p in points if p.in_fit}
    ranges = {source: constants for source, constants in without_source.items() if source in seen}
    return Validation(Constants(), fit(points), ranges, checks, dict(NOT_COVERED))


def _predicted(point: Point, quantity: str, constants: Constants) -> float:
    model = replace(point.cost_model, constants=constants)
    b, context_length = point.batch_size, point.context_length
    rate = model.tokens_per_s(b, point.num_draft_tokens, point.length, context_length)
    return rate if quantity == TOKENS_PER_S else rate / model.tokens_per_s(b, 0, 1, context_length)


def fit(points: Sequence[Point]) -> Constants:
    """bandwidth_share and layer_s with the least sum of absolute relative errors of an iteration's time, the other
    constants as they are. Only points with `in_fit` and tokens per second count; two at least are needed.

    Where reading takes longer than arithmetic, and it does at every point, an iteration's time is linear in
    1 / bandwidth_share and layer_s: iteratively reweighted least squares.
    """
    used = [p for p in points if p.in_fit and p.tokens_per_s is not None]
    assert len(used) >= 2, "two constants need two points"
    rows = np.array([_linear(p) for p in used])
    matrix, target = rows[:, :2], rows[:, 2]
    weights = np.ones(len(used))
    for _ in range(FIT_ROUNDS):
        solution = np.linalg.lstsq(matrix * weights[:, None], target * weights, rcond=None)[0]
        weights = 1 / np.sqrt(np.maximum(np.abs(matrix @ solution - target), LEAST_RESIDUAL))
    return Constants(bandwidth_share=float(1 / solution[0]), layer_s=float(solution[1]))


def _linear(point: Point) -> tuple[float, float, float]:
    """a, b, c, so that a / bandwidth_share + b layer_s = c where the prediction has no error; in measured times."""
    assert point.tokens_per_s is not None
    measured_s = point.batch_size * point.length / point.tokens_per_s
    model = point.cost_model
    model = CostModel(model.shape, model.precision, model.machine, Constants(bandwidth_share=1, layer_s=0))
    forwards = model.forwards(point.batch_size, point.num_draft_tokens, point.length, point.context_length)
    seconds = [model.seconds(work) for work in forwards]
    known_s = sum(s.latency + s.all_reduces for s in seconds)
    num_layers = sum(work.num_layers for work in forwards)
    return sum(s.reading for s in seconds) / measured_s, num_layers / measured_s, 1 - known_s / measured_s
