"""Comparison of two results.json: intervals of differences, verdicts, and what is refused, said or left out."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from specdec.eval.acceptance.by_prompt import acceptances, speedup
from specdec.eval.acceptance.compare import (
    DEFAULT_TOLERANCE,
    Comparison,
    Difference,
    Verdict,
    compare,
    detectable_loss,
    minus,
    print_comparison,
)
from specdec.eval.acceptance.intervals import (
    NO_ESTIMATE,
    Estimate,
    Quotients,
    paired_differences,
    paired_ratios,
    ratios,
)

Document = dict[str, Any]
NAMES = ["mean acceptance length", "conditional acceptance 1", "conditional acceptance 2", "speed-up"]


def estimate(value: float | None, reach: float | None = None) -> dict[str, float | None]:
    """With an interval of value +- reach."""
    low, high = (None, None) if value is None or reach is None else (value - reach, value + reach)
    return Estimate(value, low, high).as_dict()


def cell(
    length: float | None = 2.5, speedup: float | None = 1.6, reach: float | None = 0.001, **settings: Any
) -> Document:
    made = {
        "temperature": 1.0, "verification": "token", "draft_sampling": "sampled", "num_speculative_tokens": 2,
        "batch_size": 8, **settings,
    }  # fmt: skip
    group = {
        "mean_acceptance_length": estimate(length, reach),
        "conditional": [estimate(0.8, reach), estimate(0.7, reach)],
        "speedup": estimate(speedup, reach),
    }
    return {**made, "all": group}


def document(*cells: Document, **changes: Any) -> Document:
    made = {
        "schema": "specdec.acceptance",
        "version": 1,
        "provenance": {
            "specdec": "0.1.0", "checkpoint": {"folder": "/models/a", "sha256": "a" * 64}, "processor": "fast",
            "threads": "2", "kernels": "cpu", "weights": "bfloat16",
        },
        "options": {"model": "bundled", "max_tokens": 256, "seed": 0, "batch_sizes": [1, 8]},
        "prompts": {"name": "stdlib", "num_prompts": 48, "num_skipped": 0, "categories": {"code": 40, "text": 8}},
        "cells": list(cells) or [cell()],
    }  # fmt: skip
    return deepcopy(made | changes)


def changed(path: str, value: Any) -> Document:
    made = document()
    *parents, last = path.split(".")
    inner = made
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return made


def first(comparison: Comparison) -> Difference:
    return comparison.cells[0].differences[0]


def printed(comparison: Comparison) -> str:
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=200))
    return out.getvalue()


def test_the_same_twice_differs_in_nothing() -> None:
    for reach in (0.001, 0.5, None):
        comparison = compare(document(cell(reach=reach)), document(cell(reach=reach)), tolerance=0)
        assert [d.metric for d in comparison.cells[0].differences] == NAMES
        assert all(d.difference.value == 0 and d.verdict == "ok" for d in comparison.cells[0].differences)
        assert {d.real for d in comparison.cells[0].differences} == {None if reach is None else False}
        assert comparison.passed
        assert comparison.warnings == []


def test_errors_add_up_as_independent_ones_do() -> None:
    """Each limit by the errors that reach that way: down from B, up from A; and the other way round."""
    b, a = Estimate(3.0, 2.6, 3.1), Estimate(2.0, 1.5, 2.3)
    assert minus(b, a) == Estimate(
        1.0, pytest.approx(1 - math.hypot(0.4, 0.3)), pytest.approx(1 + math.hypot(0.1, 0.5))
    )
    assert minus(b, a, 0.5) == Estimate(
        2.0, pytest.approx(2 - math.hypot(0.4, 0.15)), pytest.approx(2 + math.hypot(0.1, 0.25))
    )
    assert minus(b, Estimate(2.0, None, None)) == minus(Estimate(3.0, None, None), a) == Estimate(1.0, None, None)
    assert minus(b, NO_ESTIMATE) == minus(NO_ESTIMATE, a) == NO_ESTIMATE


@pytest.mark.parametrize(
    ("length", "reach", "real", "verdict"),
    [
        (2.5, 0.001, False, "ok"),
        (2.6, 0.001, True, "ok"),
        (2.46, 0.001, True, "ok"),  # worse, within the tolerance of 0.05
        (2.44, 0.001, True, "worse"),
        (2.44, 0.03, True, "uncertain"),  # real, but not surely beyond the tolerance
        (2.44, 0.1, False, "uncertain"),
        (2.44, None, None, "uncertain"),
        (2.40, 0.03, True, "worse"),
        (2.40, 0.1, False, "uncertain"),
        (2.46, 0.1, False, "ok"),
    ],
)
def test_verdicts(length: float, reach: float | None, real: bool | None, verdict: Verdict) -> None:
    found = compare(document(cell(reach=reach)), document(cell(length, reach=reach)))
    assert first(found).difference.value == pytest.approx(length - 2.5)
    assert (first(found).real, first(found).verdict) == (real, verdict)
    assert found.passed == (verdict != "worse")
    assert found.count(verdict) == (4 if verdict == "ok" else 1)


def test_a_loss_is_worse_once_its_whole_interval_is_beyond_the_tolerance() -> None:
    a, b = document(cell(2.5, reach=0.03)), document(cell(2.3, reach=0.04))
    edge = next(
        t / 1000 for t in range(1000) if 2.3 - (1 - t / 1000) * 2.5 + math.hypot(0.04, 0.03 * (1 - t / 1000)) >= 0
    )
    assert 0.05 < edge < 0.08
    assert not compare(a, b, edge - 0.001).passed
    assert compare(a, b, edge).passed


def test_any_figure_can_be_the_one_that_is_worse() -> None:
    for name in NAMES:
        b = document()
        group = b["cells"][0]["all"]
        i = NAMES.index(name)
        target = [group["mean_acceptance_length"], *group["conditional"], group["speedup"]][i]
        target.update(estimate(0.5, 0.001))
        found = compare(document(), b)
        assert [d.metric for d in found.cells[0].differences if d.verdict == "worse"] == [name]
        assert not found.passed


def test_better_is_never_worse() -> None:
    assert compare(document(cell(2.5)), document(cell(9.0, 5.0)), tolerance=0).passed


def test_cells_are_matched_by_all_of_their_settings() -> None:
    settings = [
        {}, {"temperature": 0.6}, {"verification": "block"}, {"draft_sampling": "greedy"},
        {"num_speculative_tokens": 1}, {"batch_size": 1},
    ]  # fmt: skip
    a = document(*[cell(2.0 + i, **s) for i, s in enumerate(settings)])
    b = document(*[cell(2.0 + i, **s) for i, s in enumerate(settings)][::-1])
    found = compare(a, b)
    assert [c.differences[0].difference.value for c in found.cells] == [0] * len(settings)
    assert [c.settings["batch_size"] for c in found.cells] == [8, 8, 8, 8, 8, 1]
    assert (found.only_in_a, found.only_in_b) == ([], [])


def test_cells_of_one_document_alone_are_listed() -> None:
    a, b = document(cell(), cell(batch_size=1)), document(cell(batch_size=32), cell())
    found = compare(a, b)
    assert [s["batch_size"] for s in found.only_in_a] == [1]
    assert [s["batch_size"] for s in found.only_in_b] == [32]
    text = printed(found)
    assert "only in A: temperature 1, batch size 1, token verification, K = 2" in text
    assert "only in B: temperature 1, batch size 32, token verification, K = 2" in text


def test_plain_decoding_is_left_out() -> None:
    plain = cell(None, 1.0, num_speculative_tokens=0)
    found = compare(document(plain, cell()), document(cell()))
    assert len(found.cells) == 1
    assert found.only_in_a == []


def test_figures_without_data() -> None:
    """In both: left out. In one: uncertain."""
    without, with_it = document(cell(speedup=None)), document(cell())
    assert [d.metric for d in compare(without, without).cells[0].differences] == NAMES[:3]
    for pair in ((without, with_it), (with_it, without)):
        last = compare(*pair).cells[0].differences[-1]
        assert (last.metric, last.difference, last.real, last.verdict) == ("speed-up", NO_ESTIMATE, None, "uncertain")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (changed("schema", "specdec.speed"), "B is 'specdec.speed', version 1, not 'specdec.acceptance', version 1"),
        (changed("version", 2), "B is 'specdec.acceptance', version 2"),
        (changed("prompts.num_prompts", 47), "other prompts: num_prompts 48 and 47.*same --prompts"),
        (changed("prompts.categories", {"code": 48}), "other prompts: categories"),
        (changed("cells", [cell(batch_size=1)]), "no cell with drafts in common"),
        (changed("cells", [cell(num_speculative_tokens=0)]), "no cell with drafts in common"),
        (changed("cells", [cell(), cell()]), "B has two cells of temperature 1, batch size 8, token verification, K"),
    ],
)
def test_what_cannot_be_compared_is_refused(other: Document, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(document(), other)


@pytest.mark.parametrize("tolerance", [-0.01, 1.0, math.nan])
def test_a_tolerance_is_a_share(tolerance: float) -> None:
    with pytest.raises(ValueError, match=r"tolerance = .* must be at least 0 and below 1: 0\.02 lets B be 2 % worse"):
        compare(document(), document(), tolerance)


@pytest.mark.parametrize(
    ("other", "warning"),
    [
        (changed("prompts.name", "mine.jsonl"), "prompt sets have other names: 'stdlib' and 'mine.jsonl'"),
        (
            changed("provenance.checkpoint", {"folder": "/models/b", "sha256": "b" * 64}),
            "other checkpoints: /models/a (sha256 aaaaaaaaaaaa) and /models/b (sha256 bbbbbbbbbbbb)",
        ),
        (changed("options.max_tokens", 64), "other options: max_tokens 256 and 64"),
        (changed("options.chat", True), "other options: chat None and True"),
        (changed("provenance.threads", "8"), "other threads, and speed-ups depend on it: 2 and 8"),
    ],
)
def test_what_else_is_not_the_same_is_said(other: Document, warning: str) -> None:
    found = compare(document(), other)
    assert found.warnings == [warning]
    assert f"warning: {warning}" in printed(found)
    assert found.passed


@pytest.mark.parametrize(
    "other",
    [
        changed("provenance.specdec", "0.2.0"),
        changed("options.batch_sizes", [8]),
        changed("options.model", "/models/a"),
        changed("provenance.checkpoint.folder", "/elsewhere/a"),
    ],
)
def test_what_must_not_be_the_same_is_not_said(other: Document) -> None:
    assert compare(document(), other).warnings == []


def own(*cells: Document) -> Document:
    """A run with a drafter of the user's own."""
    made = document(*cells)
    made["options"]["drafter"] = "mine.py:Drafter"
    return made


def test_drafters_are_compared_whose_drafts_are_drawn_in_other_ways() -> None:
    """Greedy drafts with greedy ones where there are such, else with sampled ones; at temperature 0 all are greedy."""
    sampled, greedy = cell(), cell(draft_sampling="greedy")
    zero = cell(temperature=0.0, verification="greedy", draft_sampling="greedy")
    made = compare(document(zero, sampled), own(zero, greedy))
    assert [(c.settings["draft_sampling"], c.draft_sampling_in_b) for c in made.cells] == [
        ("greedy", "greedy"), ("sampled", "greedy"),
    ]  # fmt: skip
    assert (made.only_in_a, made.only_in_b) == ([], [])
    assert made.warnings == ["other drafters: the MTP layer and mine.py:Drafter"]
    text = printed(made)
    assert "Temperature 1, batch size 8, token verification, K = 2 (sampled drafts in A, greedy in B)" in text
    assert "Temperature 0, batch size 8, greedy verification, K = 2\n" in re.sub(" +\n", "\n", text)
    turned = compare(own(greedy), document(sampled, cell(num_speculative_tokens=1)))
    assert [(c.settings["draft_sampling"], c.draft_sampling_in_b) for c in turned.cells] == [("greedy", "sampled")]
    assert [c["num_speculative_tokens"] for c in turned.only_in_b] == [1]
    both = compare(document(sampled, greedy), own(greedy))
    assert [c.settings["draft_sampling"] for c in both.cells] == ["greedy"]
    assert [c["draft_sampling"] for c in both.only_in_a] == ["sampled"]


def test_of_the_same_drafter_other_ways_of_drawing_are_other_cells() -> None:
    with pytest.raises(ValueError, match="no cell with drafts in common"):
        compare(document(cell()), document(cell(draft_sampling="greedy")))


def test_what_is_printed() -> None:
    b = document(cell(2.0))
    b["cells"][0]["all"]["speedup"] = estimate(1.5, 0.2)
    text = printed(compare(document(), b))
    assert "Temperature 1, batch size 8, token verification, K = 2" in text
    (length,) = [line for line in text.splitlines() if "│ mean acceptance length" in line]
    columns = [column.strip() for column in length.split("│")[1:-1]]
    assert columns == [NAMES[0], "2.500", "2.000", "-0.500 (-0.501 to -0.499)", "yes", "worse", "2.1%"]
    assert "with 80 % power it finds losses of mean acceptance length from 2.1% on (median of cells; " in text
    assert "unpaired intervals, wider than need be: A and B of an earlier release, without counts by prompt" in text
    assert len(length) <= 100
    assert "1 uncertain: more than 2.0% below A" in text
    assert "B is worse: 1 of 4 figures more than 2.0% below A" in text
    assert "no figure is surely more than 2.0% below A" in printed(compare(document(), document()))


def test_a_comparison_is_json() -> None:
    made = compare(document(), document(cell(2.0))).as_dict()
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert (made["passed"], made["tolerance"]) == (False, DEFAULT_TOLERANCE)
    difference = made["cells"][0]["differences"][0]
    assert (difference["verdict"], difference["real"], difference["a"]["value"]) == ("worse", True, 2.5)


def test_documents_are_not_changed() -> None:
    a, b = document(), document(cell(2.0), cell(batch_size=1))
    before = deepcopy((a, b))
    compare(a, b)
    assert (a, b) == before


@pytest.mark.slow
def test_independent_runs_of_the_same_are_seldom_called_different() -> None:
    """5 % at most, of 1,000 pairs; with a loss of 10 standard errors nearly always."""
    generator = np.random.default_rng(0)
    reached = np.full((40, 2000), 50.0)

    def run(mean: float) -> list[Estimate]:
        per_prompt = generator.beta(20 * mean, 20 * (1 - mean), reached.shape)
        return ratios(generator.binomial(50, per_prompt).astype(float), reached, reached)

    a, b, lower = run(0.7), run(0.7), run(0.5)
    real = [d.low is not None and d.high is not None and (d.low > 0 or d.high < 0) for d in map(minus, b, a)]
    assert 0.035 <= np.mean(real) <= 0.065
    assert np.mean([d.high is not None and d.high < 0 for d in map(minus, lower, a)]) > 0.99


def counted_cell(accept: np.ndarray, seed: int, num_verifications: int = 60) -> Document:
    """A cell with K = 2 whose verifications accept each draft with a probability by prompt, and its estimates."""
    generator, n = np.random.default_rng(seed), len(accept)
    first = generator.binomial(num_verifications, accept)
    accepted = np.stack([first, generator.binomial(first, accept)], 1)
    reached = np.stack([np.full(n, num_verifications), first], 1)
    slow = 1 + np.arange(n) / n  # prompts whose context is long, in both runs
    tokens = num_verifications + accepted.sum(1)
    counts = {
        "prompts": list(range(n)),
        "reached": reached.tolist(),
        "accepted": accepted.tolist(),
        "plain_decode_s": (slow * tokens * generator.normal(1, 0.01, n)).tolist(),
        "plain_decode_tokens": tokens.tolist(),
        "decode_s": (slow * 1.3 * num_verifications * generator.normal(1, 0.01, n)).tolist(),
        "decode_tokens": tokens.tolist(),
    }
    return with_counts(counts)


def with_counts(counts: dict[str, Any]) -> Document:
    """A cell with these counts and the estimates that follow from them."""
    found, of_speed = acceptances(counts), speedup(counts)
    length, *conditional = ratios(*found.factors, found.most)
    made = cell()
    made["by_prompt"] = counts
    made["all"] = {
        "mean_acceptance_length": length.plus(1).as_dict(),
        "conditional": [e.as_dict() for e in conditional],
        "speedup": paired_ratios(*of_speed.factors)[0].as_dict(),
    }
    return made


def counted_document(one: Document, sha256: str = "p" * 64) -> Document:
    made = document(one)
    made["prompts"]["sha256"] = sha256
    return made


VERY_DIFFERENT = np.random.default_rng(5).beta(1.5, 0.7, 36)


def test_differences_are_taken_prompt_by_prompt() -> None:
    """Prompts differ far more than runs do: a small loss is seen with pairing only."""
    a = counted_document(counted_cell(VERY_DIFFERENT, 0))
    b = counted_document(counted_cell(0.93 * VERY_DIFFERENT, 1))
    paired, unpaired = compare(a, b), compare(document(a["cells"][0]), document(b["cells"][0]))
    for ours, other in zip(paired.cells[0].differences, unpaired.cells[0].differences, strict=True):
        assert (ours.metric, ours.paired, other.paired) == (other.metric, True, False)
        assert (ours.a, ours.b) == (other.a, other.b)
        assert ours.difference.value == pytest.approx(other.difference.value, abs=1e-9)
        assert width(ours.difference) < 0.5 * width(other.difference)
        assert ours.detectable_loss is not None
        assert other.detectable_loss is not None
        assert ours.detectable_loss < 0.7 * other.detectable_loss
    assert (first(paired).real, first(unpaired).real) == (True, False)
    assert (first(paired).verdict, first(unpaired).verdict) == ("worse", "uncertain")
    assert (paired.unpaired_because, paired.passed, unpaired.passed) == ("", False, True)
    assert "intervals are of differences prompt by prompt\n" in printed(paired)


def width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def test_a_paired_length_counts_the_token_that_is_no_draft() -> None:
    """1 + r of B less (1 - tolerance) (1 + r) of A, not of r alone: a tolerance is a share of the whole length."""
    a, b = counted_cell(VERY_DIFFERENT, 0), counted_cell(0.93 * VERY_DIFFERENT, 1)
    tolerance = 1 - b["all"]["mean_acceptance_length"]["value"] / a["all"]["mean_acceptance_length"]["value"]
    for shift, verdict in ((0.001, "ok"), (-0.001, "uncertain")):
        found = compare(counted_document(a), counted_document(b), tolerance + shift)
        assert first(found).verdict == verdict


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b["prompts"].pop("sha256"), "B of an earlier release, without counts by prompt"),
        (lambda b: b["prompts"].update(sha256="q" * 64), "A and B have other prompts, though as many of each category"),
    ],
    ids=["earlier release", "other prompts"],
)
def test_what_cannot_be_paired_is_compared_unpaired_and_said(change: Callable[[Document], Any], reason: str) -> None:
    a, b = (counted_document(counted_cell(VERY_DIFFERENT, seed)) for seed in (0, 1))
    change(b)
    found = compare(a, b)
    assert found.unpaired_because == found.as_dict()["unpaired_because"] == reason
    assert not any(d.paired for d in found.differences)
    plain = compare(document(a["cells"][0]), document(b["cells"][0]))
    assert [d.difference for d in found.differences] == [d.difference for d in plain.differences]
    assert f"unpaired intervals, wider than need be: {reason}" in printed(found)


def test_cells_without_counts_of_the_same_prompts_are_compared_unpaired() -> None:
    a, b = (counted_document(counted_cell(VERY_DIFFERENT, seed)) for seed in (0, 1))
    b["cells"][0]["by_prompt"]["prompts"][-1] += 1
    without = deepcopy(b)
    del without["cells"][0]["by_prompt"]
    for other in (b, without):
        found = compare(a, other)
        assert not any(d.paired for d in found.differences)
        assert "prompt by prompt; 4 figures that prompts say too little about are compared unpaired" in printed(found)


def test_a_figure_that_no_two_prompts_inform_about_is_compared_unpaired() -> None:
    """All drafts accepted, or all but those of one prompt: how acceptance varies is not known."""
    accept = np.ones(36)
    accept[0] = 0.5
    a, b = (counted_document(counted_cell(accept, seed)) for seed in (0, 1))
    found = compare(a, b).cells[0].differences
    assert [d.paired for d in found] == [False, False, False, True]
    assert found[0].difference == minus(found[0].b, found[0].a)


@pytest.mark.parametrize("shape", [(5.0, 2.5), (1.5, 0.7)])
def test_a_detectable_loss_is_detected_in_80_percent_of_runs(shape: tuple[float, float]) -> None:
    generator, n, tolerance, num_runs = np.random.default_rng(1), 36, 0.02, 1500
    likely = generator.beta(*shape, (n, num_runs))

    def run(loss: float) -> Quotients:
        reached = generator.integers(80, 120, likely.shape)
        accepted = generator.binomial(reached, (1 - loss) * likely)
        return Quotients(np.stack([accepted, reached]).astype(float), reached.astype(float))

    def allowed(a: Quotients, b: Quotients) -> list[Estimate]:
        return paired_differences(a, b, 1 - tolerance)

    def losses(loss: float) -> tuple[float, float]:
        """The median detectable loss, and how often B is called worse."""
        a, b = run(0.0), run(loss)
        found = allowed(a, b)
        detectable = [
            detectable_loss(e, Estimate(value, None, None), tolerance) for e, value in zip(found, a.values.tolist())
        ]
        worse = np.mean([e.high is not None and e.high < 0 for e in found])
        return float(np.median([d for d in detectable if d is not None])), float(worse)

    loss, by_chance = losses(tolerance)
    assert by_chance < 0.04
    assert 0.03 < loss < 0.1
    assert 0.75 < losses(loss)[1] < 0.86


def test_without_an_interval_there_is_no_detectable_loss() -> None:
    found = compare(document(cell(reach=None)), document(cell(reach=None)))
    assert all(d.detectable_loss is None for d in found.differences)
    assert found.detectable("speed-up") is None
    assert "80 % power" not in printed(found)


def test_detectable_losses_are_summed_up_over_cells() -> None:
    cells = [cell(reach=reach, batch_size=b) for b, reach in ((1, 0.01), (2, 0.05), (4, 9.0))]
    found = compare(document(*cells), document(*cells))
    losses = [c.differences[0].detectable_loss for c in found.cells]
    assert losses[0] == pytest.approx(0.02 + (1 + 0.8416 / 1.96) * math.hypot(0.01, 0.98 * 0.01) / 2.5, rel=1e-4)
    summary = {"least": losses[0], "median": losses[1], "most": losses[2]}
    assert found.as_dict()["detectable_losses"]["mean acceptance length"] == summary
    text = "with 80 % power it finds losses of mean acceptance length from 6.0% on (median of cells; 2.8% to over 100%)"
    assert text in printed(found)
