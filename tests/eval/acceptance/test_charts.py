"""What is drawn: which cells, which values, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest

from specdec.eval.acceptance.charts import MAX_PANELS, Chart, Series, build_charts
from support.acceptance_document import cell, document, estimate, without_values

NAMES = [
    "speedup-batch-1", "speedup-batch-8", "acceptance-conditional", "acceptance-unconditional", "calibration",
    "acceptance-by-output-position", "acceptance-by-entropy", "experts",
]  # fmt: skip


def charts_of(made: dict[str, Any]) -> dict[str, Chart]:
    return {chart.name: chart for chart in build_charts(made).charts}


def series_of(chart: Chart, panel: str, label: str) -> Series:
    (found,) = [s for p in chart.panels if p.title == panel for s in p.series if s.label == label]
    return found


def cells_of(made: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    return [c for c in made["cells"] if all(c[name] == value for name, value in settings.items())]


def test_there_is_a_chart_of_everything_that_has_data() -> None:
    made = build_charts(document())
    assert [chart.name for chart in made.charts] == NAMES
    assert made.missing == []
    for chart in made.charts[:-1]:
        assert [p.title for p in chart.panels] == ["temperature 0", "temperature 0.6", "temperature 1"]
        labels = [[s.label for s in p.series] for p in chart.panels]
        assert labels == [["greedy"], ["coupled", "block", "token"], ["coupled", "block", "token"]]


def test_the_speed_up_is_shown_of_every_k_and_batch_size() -> None:
    made = document()
    charts = charts_of(made)
    for batch_size in (1, 8):
        chart = charts[f"speedup-batch-{batch_size}"]
        points = series_of(chart, "temperature 0.6", "block").points
        cells = cells_of(made, temperature=0.6, verification="block", batch_size=batch_size)
        assert [(p.x, p.label, p.estimate) for p in points] == [
            (k, f"K = {k}", c["all"]["speedup"]) for k, c in zip((1, 2, 3, 5), cells, strict=True)
        ]
        for panel in chart.panels:
            assert panel.guide is not None
            assert panel.guide.ys == [1, 1]
        assert chart.ticks == ((1, "1"), (2, "2"), (3, "3"), (5, "5"))


@pytest.mark.parametrize("metric", ["conditional", "unconditional"])
def test_acceptance_by_draft_position_is_that_of_the_largest_k_and_the_smallest_batch(metric: str) -> None:
    made = document()
    chart = charts_of(made)[f"acceptance-{metric}"]
    for label in ("coupled", "block", "token"):
        (one,) = cells_of(made, temperature=1.0, verification=label, num_speculative_tokens=5, batch_size=1)
        one["all"][metric][2] = estimate(0.123)
        points = series_of(charts_of(made)[chart.name], "temperature 1", label).points
        assert [p.estimate for p in points] == one["all"][metric]
        assert [p.x for p in points] == [1, 2, 3, 4, 5]
    assert chart.notes == ("Shown: K = 5, batch size 1.",)


def test_calibration_is_drawn_at_the_mean_expected_acceptance_and_says_the_ece() -> None:
    """The confidence in a draft is another figure and has no part in it."""
    made = document()
    (one,) = cells_of(made, temperature=0.6, verification="token", num_speculative_tokens=5, batch_size=1)
    expected = one["by_expected_acceptance"]
    expected["ece"] = estimate(0.0777)
    expected["bins"][4] |= {"mean": 0.4321}
    expected["bins"][0] |= {"mean": None, "num_drafts": 0, "acceptance": estimate(None)}
    for other in made["cells"]:
        del other["calibration"]
    chart = charts_of(made)["calibration"]
    assert "expected" in chart.x_label
    assert "measured" in chart.y_label
    series = series_of(chart, "temperature 0.6", "token")
    assert series.detail == "ECE 0.078"
    assert "temperature 0.6, token (ECE 0.078): " in chart.alt
    assert [p.x for p in series.known][3] == 0.4321
    assert [p.estimate for p in series.known] == [b["acceptance"] for b in expected["bins"][1:]]
    assert series.points[4].label == "expected 0.4 to 0.5"
    guide = chart.panels[0].guide
    assert guide is not None
    assert (guide.xs, guide.ys) == ([0, 1], [0, 1])


def test_bins_are_written_as_numbers_of_their_kind() -> None:
    charts = charts_of(document())
    whole = [label for _, label in charts["acceptance-by-output-position"].ticks]
    assert whole == ["1\N{EN DASH}7", "8\N{EN DASH}15", "16\N{EN DASH}31", "32\N{EN DASH}63", "64\N{EN DASH}127",
                     "128\N{EN DASH}255"]  # fmt: skip
    of_floats = document()
    for one in of_floats["cells"]:
        for b in one["by_output_position"]:
            b |= {"low": float(b["low"]), "high": float(b["high"])}
    assert [label for _, label in charts_of(of_floats)["acceptance-by-output-position"].ticks] == whole
    entropy = [label for _, label in charts["acceptance-by-entropy"].ticks]
    assert (entropy[1], entropy[-1]) == ("0.1\N{EN DASH}0.25", "4 or more")


def test_bins_without_drafts_take_no_room_and_those_of_others_leave_a_gap() -> None:
    made = document((0.6,), ("block", "token"), (2,), (1,))
    _, block, token = made["cells"]
    empty = {"num_drafts": 0, "mean": None, "acceptance": estimate(None)}
    for one in (block, token):
        one["by_entropy"][0] |= empty
    token["by_entropy"][2] |= empty
    chart = charts_of(made)["acceptance-by-entropy"]
    assert [label for _, label in chart.ticks][:2] == ["0.1\N{EN DASH}0.25", "0.25\N{EN DASH}0.5"]
    points = series_of(chart, "temperature 0.6", "token").points
    assert [p.x for p in points] == list(range(7))
    assert points[0].estimate == token["by_entropy"][1]["acceptance"]
    assert points[1].estimate["value"] is None
    assert series_of(chart, "temperature 0.6", "block").points[1].estimate["value"] is not None


def test_experts_show_the_mean_every_layer_and_the_law() -> None:
    made = document()
    (panel,) = charts_of(made)["experts"].panels
    mean = made["experts"]["mean"]
    assert [p.estimate for p in panel.series[0].points] == [p["measured"] for p in mean]
    assert panel.guide is not None
    assert panel.guide.ys == [p["expected"] for p in mean]
    assert len(panel.background) == 5
    assert panel.background[2].ys == [p["measured"]["value"] for p in made["experts"]["layers"][2]["points"]]
    assert panel.title == "E = 16 experts, k = 2 per token"


def test_without_values_there_are_notes_and_no_charts() -> None:
    for made in (without_values(document()), document(lengths=()) | {"experts": None}):
        charts = build_charts(made)
        assert charts.charts == []
        assert "Calibration: measured against expected acceptance: no data." in charts.missing
        assert "Distinct experts by number of verified tokens: no data." in charts.missing


def test_a_rule_without_data_is_left_out_with_a_note() -> None:
    made = document((0.0, 0.6), ("block", "token"), (1, 2), (1,))
    for one in cells_of(made, verification="token"):
        one["by_entropy"] = []
    for one in cells_of(made, temperature=0.0):
        one["all"]["speedup"] = estimate(None)
    charts = charts_of(made)
    assert "Left out, no data: temperature 0.6, token." in charts["acceptance-by-entropy"].notes
    assert [s.label for s in charts["acceptance-by-entropy"].panels[1].series] == ["block"]
    assert [p.title for p in charts["speedup-batch-1"].panels] == ["temperature 0.6"]
    assert charts["speedup-batch-1"].notes == ("Left out, no data: temperature 0, greedy.",)
    assert len(charts["calibration"].panels) == 2


def test_cells_with_data_stand_for_their_rule_and_differences_are_said() -> None:
    made = document((0.6,), ("block", "token"), (1, 2), (1,))
    (longest,) = cells_of(made, verification="token", num_speculative_tokens=2)
    longest["by_entropy"] = []
    chart = charts_of(made)["acceptance-by-entropy"]
    assert set(chart.notes) == {
        "Shown: K = 2, batch size 1 (temperature 0.6, block).", "Shown: K = 1, batch size 1 (temperature 0.6, token).",
    }  # fmt: skip


def test_many_temperatures_make_several_charts_of_few_panels() -> None:
    temperatures = tuple(i / 10 for i in range(7))
    charts = build_charts(document(temperatures, ("block",), (1,), (1,))).charts
    assert len({chart.name for chart in charts}) == len(charts)
    parts = [chart for chart in charts if chart.name.startswith("calibration")]
    assert [c.name for c in parts] == ["calibration-1", "calibration-2", "calibration-3"]
    assert [p.title for c in parts for p in c.panels] == [f"temperature {t:g}" for t in temperatures]
    assert max(len(c.panels) for c in charts) == MAX_PANELS
    assert [len(c.notes) for c in parts] == [0, 0, 1]


def test_the_alternative_text_has_the_values() -> None:
    made = document((0.6,), ("block",), (1, 3), (1,))
    made["cells"].append(cell(0.6, "token", "sampled", 3, 1))
    alt = charts_of(made)["speedup-batch-1"].alt
    first, last = (c["all"]["speedup"] for c in made["cells"][1:3])
    assert f"block: {first['value']:.3g} ({first['low']:.3g} to {first['high']:.3g}) at K = 1" in alt
    assert f"{last['value']:.3g} ({last['low']:.3g} to {last['high']:.3g}) at K = 3. temperature 0.6, token" in alt
    assert alt.count(" at K = ") == 3
    assert alt.startswith("Chart: Speed-up over plain decoding, batch size 1; times plain decoding by K")
