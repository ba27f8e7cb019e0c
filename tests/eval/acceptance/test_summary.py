"""The sentences that come first."""

from __future__ import annotations

from typing import Any

import pytest

from specdec.eval.acceptance.summary import (
    Section,
    cell_name,
    check_verdict,
    estimate_text,
    failed_checks,
    interval_text,
    rule_label,
    rule_name,
    sections,
    speculative,
)
from support.acceptance_document import cell, check, document, estimate, without_values


def section_of(*speedups: tuple[float | None, float | None, float | None]) -> Section:
    """K = 1, 2, ... with token rejection, beside plain decoding."""
    cells = [cell(0.6, "coupled", "sampled", 0, 4)]
    for k, (value, low, high) in enumerate(speedups, 1):
        cells.append(cell(0.6, "token", "sampled", k, 4))
        cells[-1]["all"]["speedup"] = {"value": value, "low": low, "high": high}
    return Section(0.6, 4, cells)


@pytest.mark.parametrize(
    ("speedups", "verdict"),
    [
        (
            [(1.2, 1.1, 1.3), (1.5, 1.4, 1.6), (1.4, 1.3, 1.5)],
            "K = 2 with token verification is best, 1.50 (95 % interval 1.40 to 1.60) times the speed of plain "
            "decoding.",
        ),
        (
            [(0.9, 0.8, 1.0), (1.02, 0.97, 1.07)],
            "no K is clearly faster than plain decoding; the best, K = 2 with token verification, reaches 1.02 "
            "(95 % interval 0.97 to 1.07) times the speed of plain decoding.",
        ),
        (
            [(0.9, 0.8, 0.95), (0.7, 0.6, 0.8)],
            "plain decoding is faster than the best speculation, K = 1 with token verification, which reaches 0.90 "
            "(95 % interval 0.80 to 0.95) times the speed of plain decoding.",
        ),
        (
            [(1.2, 1.1, 1.3), (1.3, 1.05, 1.4), (1.5, 0.9, 2.1)],
            "K = 3 with token verification is best by its value, 1.50 (95 % interval 0.90 to 2.10) times the speed of "
            "plain decoding; K = 1 with token verification, 1.20 (1.10 to 1.30), is the surest gain.",
        ),
        (
            [(1.3, None, None)],
            "K = 1 with token verification is best, 1.30 times the speed of plain decoding.",
        ),
        (
            [(0.8, None, None)],
            "plain decoding is faster than the best speculation, K = 1 with token verification, which reaches 0.80 "
            "times the speed of plain decoding.",
        ),
        ([], "no draft was verified."),
    ],
)
def test_the_verdict_says_which_k_is_best_and_by_how_much(speedups: list[Any], verdict: str) -> None:
    assert section_of(*speedups).verdict == verdict


def test_without_plain_decoding_the_longest_acceptance_is_best() -> None:
    section = section_of((None, None, None), (None, None, None))
    section.cells[1]["all"]["mean_acceptance_length"] = estimate(2.5, 0.1)
    section.cells[2]["all"]["mean_acceptance_length"] = estimate(2.4, 0.1)
    assert section.best is section.cells[1]
    assert section.verdict == (
        "no plain decoding to compare with; K = 1 with token verification gets furthest, 2.50 (2.40 to 2.65) tokens "
        "per verification."
    )


def test_plain_decoding_is_never_the_best_speculation() -> None:
    section = section_of((0.5, 0.4, 0.6))
    assert section.best is section.cells[1]


def test_sections_are_ordered_whatever_the_order_of_cells() -> None:
    made = document()
    expected = [(t, b) for t in (0, 0.6, 1) for b in (1, 8)]
    made["cells"].reverse()
    found = sections(made)
    assert [(s.temperature, s.batch_size) for s in found] == expected
    assert sum(len(s.cells) for s in found) == len(made["cells"])
    for s in found:
        assert [speculative(c) for c in s.cells] == [False] + [True] * (len(s.cells) - 1)
    of_one = [(c["verification"], c["num_speculative_tokens"]) for c in found[2].cells[1:]]
    assert of_one == [(rule, k) for rule in ("coupled", "block", "token") for k in (1, 2, 3, 5)]
    assert found[2].name == "temperature 0.6, batch size 1"


@pytest.mark.parametrize(
    ("settings", "label", "name"),
    [
        ((0.0, "greedy", "greedy", 3), "greedy", "greedy verification"),
        ((0.6, "block", "sampled", 3), "block", "block verification"),
        ((0.6, "block", "greedy", 3), "block, greedy drafts", "block verification of greedy drafts"),
        ((0.6, "coupled", "sampled", 0), "plain", "plain decoding"),
        ((0.0, "greedy", "greedy", 0), "plain", "plain decoding"),
    ],
)
def test_settings_have_names(settings: tuple[float, str, str, int], label: str, name: str) -> None:
    one = cell(*settings, batch_size=8)
    assert (rule_label(one), rule_name(one)) == (label, name)
    end = ", K = 3" if settings[3] else ""
    assert cell_name(one) == f"temperature {settings[0]:g}, batch size 8, {name}{end}"


def test_failed_checks_are_counted_among_those_made() -> None:
    made = document()
    num_checks = sum(speculative(c) for c in made["cells"])
    assert failed_checks(made) == []
    assert check_verdict(made) == f"All {num_checks} checks of acceptance against the model's own distributions passed."
    made["cells"][-1]["check"] = check(3, passed=False)
    assert failed_checks(made) == [made["cells"][-1]]
    assert check_verdict(made) == f"1 of {num_checks} checks against the model's own distributions FAILED."
    assert check_verdict(without_values(made)) == "Acceptance was not checked against the model's own distributions."


def test_estimates_are_written_with_what_is_known() -> None:
    assert estimate_text({"value": 1.934, "low": 1.876, "high": 2.0}, ".2f") == "1.93 (1.88 to 2.00)"
    assert estimate_text({"value": 0.0, "low": 0.0, "high": 0.0}, ".1f") == "0.0 (0.0 to 0.0)"
    assert estimate_text({"value": 1.934, "low": None, "high": None}, ".2f") == "1.93"
    assert estimate_text(estimate(None), ".2f") == interval_text(estimate(None), ".2f") == ""
