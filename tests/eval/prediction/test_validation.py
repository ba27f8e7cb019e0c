"""The validation is computed, honestly, from the published points; and everything is shown."""

from __future__ import annotations

import io
import json
import statistics
from dataclasses import replace

import pytest
from rich.console import Console

from specdec.eval.prediction import AcceptanceRates, Prediction, PredictOptions, Validation, predict, validate
from specdec.eval.prediction.costs import Constants
from specdec.eval.prediction.predict import assumptions
from specdec.eval.prediction.published import POINTS
from specdec.eval.prediction.report import as_json, print_report
from specdec.eval.prediction.validation import SPEEDUP, TOKENS_PER_S, fit

OPTIONS = PredictOptions("glm-4.5-air", "h200", 2, "fp8", AcceptanceRates.given((0.9, 0.7, 0.5), "test"))


@pytest.fixture(scope="module")
def validation() -> Validation:
    return validate()


def test_the_fit_finds_the_constants_that_made_the_points() -> None:
    made = Constants(bandwidth_share=0.55, layer_s=200e-6)
    points = []
    for point in POINTS:
        if point.in_fit:
            model = replace(point.cost_model, constants=made)
            rate = model.tokens_per_s(point.batch_size, point.num_draft_tokens, point.length, point.context_length)
            points.append(replace(point, tokens_per_s=rate))
    found = fit(points)
    assert found.bandwidth_share == pytest.approx(0.55)
    assert found.layer_s == pytest.approx(200e-6)
    outlier = replace(points[0], tokens_per_s=points[0].tokens_per_s / 3)
    assert fit([outlier, *points[1:]]).layer_s == pytest.approx(200e-6, rel=0.01), "one wild point does not move it"
    assumed = replace(points[0], tokens_per_s=1.0, in_fit=False)
    assert fit([assumed, *points]) == fit(points)


def test_the_constants_in_use_are_those_of_the_fit(validation: Validation) -> None:
    assert validation.fitted == fit(POINTS)
    assert Constants().bandwidth_share == round(validation.fitted.bandwidth_share, 2)
    assert Constants().layer_s == pytest.approx(validation.fitted.layer_s, abs=0.5e-6)
    for point in POINTS:
        model = point.cost_model
        for work in model.forwards(point.batch_size, point.num_draft_tokens, point.length, point.context_length):
            seconds = model.seconds(work)
            assert seconds.reading > seconds.arithmetic, "else an iteration is not linear in what is fitted"


def test_a_point_is_predicted_without_itself_and_without_its_source() -> None:
    before = validate()
    chosen = next(p for p in POINTS if p.in_fit and p.num_draft_tokens == 0 and p.batch_size == 63)
    points = [replace(p, tokens_per_s=3 * p.tokens_per_s) if p is chosen else p for p in POINTS]
    after = validate(points)
    at = POINTS.index(chosen)
    index = next(i for i, check in enumerate(before.checks) if check.point is POINTS[at])
    old, new = before.checks[index], after.checks[index]
    assert (new.measured, new.predicted, new.without_point) == (3 * old.measured, old.predicted, old.without_point)
    assert new.without_source == old.without_source
    assert after.fitted != before.fitted
    beside = [i for i, check in enumerate(before.checks) if check.point.source == chosen.source and i != index]
    assert beside
    for i in beside:
        assert after.checks[i].without_source == before.checks[i].without_source
        assert after.checks[i].without_point != before.checks[i].without_point


def test_every_published_figure_is_checked_and_medians_are_of_them(validation: Validation) -> None:
    figures = [p.tokens_per_s for p in POINTS] + [p.speedup for p in POINTS]
    assert len(validation.checks) == sum(figure is not None for figure in figures)
    for check in validation.checks:
        assert check.quantity == TOKENS_PER_S or check.point.num_draft_tokens > 0
        point, model = check.point, check.point.cost_model
        b, context = point.batch_size, point.context_length
        expected = b * point.length / model.iteration(b, point.num_draft_tokens, point.length, context).total_s
        if check.quantity == SPEEDUP:
            expected *= model.iteration(b, 0, 1, context).total_s / b
        assert check.predicted == pytest.approx(expected)
    for quantity, known_only in ((None, False), (None, True), (TOKENS_PER_S, False), (SPEEDUP, False)):
        chosen = [c for c in validation.checks if quantity in (None, c.quantity) and (c.point.in_fit or not known_only)]
        errors = validation.median_errors(quantity, known_only)
        assert errors is not None
        assert errors.num_checks == len(chosen)
        assert errors.without_source == statistics.median(abs(c.without_source / c.measured - 1) for c in chosen)
        assert errors.without_point == statistics.median(abs(c.without_point / c.measured - 1) for c in chosen)
        assert errors.fitted == statistics.median(abs(c.predicted / c.measured - 1) for c in chosen)
        assert errors.bias == statistics.median(c.without_source / c.measured - 1 for c in chosen)
    assert validate([p for p in POINTS if p.speedup is None]).median_errors(SPEEDUP) is None


def test_what_is_missed_is_explained(validation: Validation) -> None:
    assert validation.missed == [c for c in validation.checks if abs(c.without_source / c.measured - 1) > 0.2]
    for check in validation.missed:
        assert check.point.reason
    for point in POINTS:
        assert point.source
        assert point.in_fit or "assumed" in point.conditions
        memory = point.cost_model.memory(point.batch_size, point.context_length, with_mtp=point.num_draft_tokens > 0)
        assert memory.weights + memory.kv_cache <= memory.available, f"{point.engine}: it did fit"


def rendered(prediction: Prediction, validation: Validation) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    print_report(prediction, validation, console)
    return console.export_text()


def test_a_report_shows_what_was_computed(validation: Validation) -> None:
    prediction = predict(replace(OPTIONS, batch_sizes=(1, 64), draft_lengths=(0, 1, 4)))
    text = rendered(prediction, validation)
    for cell in prediction.cells:
        assert f"{cell.tokens_per_s:.0f}" in text
    for sentence in (*assumptions(prediction), *prediction.warnings):
        assert sentence in text
    for check in validation.checks:
        assert f"{check.predicted:.4g}" in text
        assert f"{check.error():+.0%}" in text
    for check in validation.missed:
        assert check.point.reason in text
    for source in validation.not_covered:
        assert source in text
    errors = validation.median_errors()
    assert errors is not None
    assert f"Median error of {errors.num_checks} figures: {errors.without_source:.1%}" in text


def test_a_report_is_json(validation: Validation) -> None:
    prediction = predict(replace(OPTIONS, batch_sizes=(1, 64)))
    document = json.loads(json.dumps(as_json(prediction, validation), allow_nan=False))
    assert document["schema"] == 1
    assert document["best_draft_length"] == {str(b): prediction.best(b).num_draft_tokens for b in (1, 64)}
    assert [cell["tokens_per_s"] for cell in document["cells"]] == [cell.tokens_per_s for cell in prediction.cells]
    assert sum(cell["is_best"] for cell in document["cells"]) == 2
    assert document["options"]["acceptance"]["unconditional"] == [0.9, 0.7, 0.5]
    checks = document["validation"]["checks"]
    assert [check["predicted_without_source"] for check in checks] == [c.without_source for c in validation.checks]
    assert {c["missed_because"] for c in checks if c["missed_because"]} == {c.point.reason for c in validation.missed}
