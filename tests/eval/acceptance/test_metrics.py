"""Every figure of a cell against loops over its records, one verification and draft after the other, and by hand."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from specdec.eval.acceptance.intervals import NO_ESTIMATE, Estimate, calibration_error, paired_ratios, ratios
from specdec.eval.acceptance.metrics import Bin, CellMetrics, Check, Group, cell_metrics
from specdec.eval.acceptance.plan import Cell
from specdec.eval.acceptance.pooling import Sums
from specdec.eval.acceptance.records import Analysis, RequestRecord
from specdec.eval.acceptance.schema import CELL, _faults
from specdec.eval.files import finite

K = 3
CELL_K3 = Cell(1.0, 8, "token", "sampled", K)
WALL_S = [12.5, 14.0]


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def record(prompt: int, verifications: list[tuple[int, int, int]], category: str = "a", **fields: Any) -> RequestRecord:
    """verifications: (start, drafted, accepted)."""
    starts, drafted, accepted = (ints(*column) for column in zip(*verifications)) if verifications else (ints(),) * 3
    made = RequestRecord(prompt, category, 0, 0, 10, 9, 0, len(starts) + 1, starts, drafted, accepted, 0.5, 2.0, 8)
    return replace(made, **fields)


def random_record(generator: np.random.Generator, prompt: int, turn: int, repeat: int) -> RequestRecord:
    n = int(generator.integers(0, 30)) if generator.random() < 0.9 else 0
    drafted = generator.integers(1, K + 1, n)
    accepted = np.minimum(generator.geometric(0.4, n) - 1, drafted)
    num_prompt_tokens = int(generator.integers(3, 50))
    forwards = n + int(generator.integers(1, 4))
    num_output_tokens = int(accepted.sum()) + forwards
    return RequestRecord(
        prompt=prompt,
        category="xyz"[prompt % 3],
        turn=turn,
        repeat=repeat,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        num_loop_tokens=int(generator.integers(num_output_tokens + 1)) if generator.random() < 0.5 else 0,
        num_target_forwards=forwards,
        starts=num_prompt_tokens + 1 + np.concatenate([[0], np.cumsum(accepted + 1)[:-1]]).astype(np.int64)[:n],
        num_drafted=drafted,
        num_accepted=accepted,
        ttft_s=float(generator.lognormal()),
        decode_s=float(generator.lognormal()) * (forwards > 1),
        num_decode_tokens=int(accepted.sum()) + forwards - 1,
        analysis=random_analysis(generator, drafted) if generator.random() < 0.7 else None,
    )


def random_analysis(generator: np.random.Generator, drafted: np.ndarray) -> Analysis:
    indices = np.flatnonzero(generator.random(len(drafted)) < 0.6)
    columns = [generator.random((len(indices), K)) * scale for scale in (1, 1, 5, 1)]
    for column in columns:
        column[np.arange(K) >= drafted[indices, None]] = np.nan
    return Analysis(indices, *columns, num_other_drafts=int(generator.integers(3)))


def random_records(seed: int) -> tuple[list[RequestRecord], list[RequestRecord]]:
    """Speculative and plain: 14 prompts of 3 categories, up to 2 turns, 2 repeats; some without a partner."""
    generator = np.random.default_rng(seed)
    keys = [(prompt, turn, repeat) for prompt in range(14) for turn in range(1 + prompt % 2) for repeat in range(2)]
    both = []
    for _ in range(2):
        records = [random_record(generator, *key) for key in keys if generator.random() < 0.9]
        both.append([records[i] for i in generator.permutation(len(records))])
    return both[0], both[1]


@pytest.fixture(scope="module", params=[0, 1, 2])
def cell(request: pytest.FixtureRequest) -> tuple[list[RequestRecord], list[RequestRecord], CellMetrics]:
    records, plain = random_records(request.param)
    return records, plain, cell_metrics(CELL_K3, records, plain, WALL_S)


def table(
    records: list[RequestRecord], pairs: Callable[[RequestRecord], Iterator[tuple[float, ...]]], columns: int
) -> list[np.ndarray]:
    """Sums over each prompt's records of what `pairs` yields: as many columns [prompts, 1]."""
    sums: dict[int, list[float]] = {}
    for r in records:
        row = sums.setdefault(r.prompt, [0.0] * columns)
        for values in pairs(r):
            for i, value in enumerate(values):
                row[i] += value
    return list(np.array([sums[prompt] for prompt in sorted(sums)]).T[:, :, None])


def assert_same(found: Estimate, expected: Estimate) -> None:
    for x, y in zip(vars(found).values(), vars(expected).values()):
        assert x == (None if y is None else pytest.approx(y, rel=1e-9))


def verifications(r: RequestRecord) -> Iterator[tuple[int, int]]:
    yield from zip(r.num_drafted.tolist(), r.num_accepted.tolist())


def assert_group(group: Group, records: list[RequestRecord], plain: list[RequestRecord]) -> None:
    for i in range(1, K + 1):
        x, y = table(records, lambda r, i=i: ((a >= i, a >= i - 1) for k, a in verifications(r) if k >= i), 2)
        assert_same(group.conditional[i - 1], ratios(x, y, y)[0])
        x, y = table(records, lambda r, i=i: ((a >= i, 1) for k, a in verifications(r) if k >= i), 2)
        assert_same(group.unconditional[i - 1], ratios(x, y, y)[0])
    accepted, drafted, count = table(records, lambda r: ((a, k, 1) for k, a in verifications(r)), 3)
    length = ratios(accepted, count, drafted)[0]
    assert_same(group.mean_acceptance_length, length.plus(1))
    assert group.mean_acceptance_length.value == pytest.approx((accepted.sum() + count.sum()) / count.sum())
    assert_same(group.draft_efficiency, ratios(accepted, drafted, drafted)[0])
    tokens, forwards = table(records, lambda r: iter([(r.num_decode_tokens, r.num_target_forwards - 1)]), 2)
    assert_same(group.block_efficiency, ratios(tokens, forwards)[0])
    decoded = [r for r in records if r.decode_s > 0]
    rates, count_decoded = table(decoded, lambda r: iter([(r.num_decode_tokens / r.decode_s, 1)]), 2)
    assert_same(group.tokens_per_s_per_request, ratios(rates, count_decoded)[0])
    loop, output = table(records, lambda r: iter([(r.num_loop_tokens, r.num_output_tokens)]), 2)
    assert_same(group.final_loop_share, ratios(loop, output, output)[0])
    times, requests = table(records, lambda r: iter([(r.ttft_s, 1)]), 2)
    assert_same(group.ttft_s, ratios(times, requests)[0])
    assert_same(group.speedup, speedup_by_loop(records, plain))
    assert group.num_requests == len(records)
    assert group.num_verifications == count.sum()


def speedup_by_loop(records: list[RequestRecord], plain: list[RequestRecord]) -> Estimate:
    def pairs(r: RequestRecord) -> Iterator[tuple[float, ...]]:
        for p in plain:
            if (p.prompt, p.turn, p.repeat) == (r.prompt, r.turn, r.repeat):
                yield p.decode_s, p.num_decode_tokens, r.decode_s, r.num_decode_tokens

    return paired_ratios(*table(records, pairs, 4))[0]


def test_all_requests(cell: tuple[list[RequestRecord], list[RequestRecord], CellMetrics]) -> None:
    records, plain, metrics = cell
    assert_group(metrics.all, records, plain)
    assert metrics.num_requests == len(records)
    assert metrics.num_output_tokens == sum(r.num_output_tokens for r in records)
    assert metrics.num_target_forwards == sum(r.num_target_forwards for r in records)
    assert metrics.num_verifications == sum(len(r.starts) for r in records)


def test_each_category(cell: tuple[list[RequestRecord], list[RequestRecord], CellMetrics]) -> None:
    records, plain, metrics = cell
    assert list(metrics.categories) == ["x", "y", "z"]
    for category, group in metrics.categories.items():
        assert_group(group, [r for r in records if r.category == category], plain)
        assert group.tokens_per_s is None


def test_total_speed_varies_over_repeats(cell: tuple[list[RequestRecord], list[RequestRecord], CellMetrics]) -> None:
    records, plain, metrics = cell
    tokens = np.array([[sum(r.num_output_tokens for r in records if r.repeat == i)] for i in range(2)], float)
    assert metrics.all.tokens_per_s is not None
    assert_same(metrics.all.tokens_per_s, ratios(tokens, np.array(WALL_S)[:, None])[0])
    assert metrics.all.tokens_per_s.value == pytest.approx(tokens.sum() / sum(WALL_S))
    assert metrics.all.tokens_per_s.low is not None
    first = cell_metrics(CELL_K3, [r for r in records if r.repeat == 0], plain, WALL_S[:1])
    assert first.all.tokens_per_s == Estimate(pytest.approx(tokens[0, 0] / WALL_S[0]), None, None)


def drafts(r: RequestRecord) -> Iterator[dict[str, float]]:
    """Of analysed verifications, those drafts that the rule came to."""
    if r.analysis is None:
        return
    for row, index in enumerate(r.analysis.indices):
        for i in range(1, K + 1):
            if r.num_drafted[index] >= i and r.num_accepted[index] >= i - 1:
                names = ("entropy", "confidence", "alpha", "expected")
                values = {name: getattr(r.analysis, name)[row, i - 1] for name in names}
                yield {"position": i, "accepted": float(r.num_accepted[index] >= i), **values}


def assert_bins(
    found: list[Bin], edges: list[float], records: list[RequestRecord],
    values: Callable[[RequestRecord], Iterator[tuple[float, float]]],
) -> None:  # fmt: skip
    """values: (quantity, accepted) of a record's drafts."""
    assert [(b.low, b.high) for b in found] == [
        (low, None if math.isinf(high) else high) for low, high in itertools.pairwise(edges)
    ]
    for b in found:
        inside = [
            (prompt, quantity, accepted)
            for prompt, quantity, accepted in ((r.prompt, *pair) for r in records for pair in values(r))
            if b.low <= quantity and (b.high is None or quantity < b.high or b.high == quantity == 1.0)
        ]
        assert b.num_drafts == len(inside)
        assert b.mean == (pytest.approx(sum(q for _, q, _ in inside) / len(inside)) if inside else None)
        prompts = sorted({prompt for prompt, *_ in inside})
        hits, counts = np.zeros((2, len(prompts), 1))
        for prompt, _, accepted in inside:
            hits[prompts.index(prompt)] += accepted
            counts[prompts.index(prompt)] += 1
        assert_same(b.acceptance, ratios(hits, counts, counts)[0])


def test_acceptance_by_output_position(cell: tuple[list[RequestRecord], list[RequestRecord], CellMetrics]) -> None:
    records, _, metrics = cell

    def values(r: RequestRecord) -> Iterator[tuple[float, float]]:
        for start, a in zip(r.starts.tolist(), r.num_accepted.tolist()):
            yield start - r.num_prompt_tokens, a >= 1

    last = max(quantity for r in records for quantity, _ in values(r))
    edges = [1.0, 8.0]
    while edges[-1] <= last:
        edges.append(2 * edges[-1])
    assert len(edges) > 3
    assert_bins(metrics.by_output_position, edges, records, values)


def test_acceptance_by_entropy(cell: tuple[list[RequestRecord], list[RequestRecord], CellMetrics]) -> None:
    records, _, metrics = cell
    edges = [0, 0.1, 0.25, 0.5, 1, 2, 3, 4, math.inf]
    assert_bins(metrics.by_entropy, edges, records, lambda r: ((d["entropy"], d["accepted"]) for d in drafts(r)))


@pytest.mark.parametrize(("name", "quantity"), [("calibration", "confidence"), ("by_expected_acceptance", "expected")])
def test_calibration(
    cell: tuple[list[RequestRecord], list[RequestRecord], CellMetrics], name: str, quantity: str
) -> None:
    records, _, metrics = cell
    found = getattr(metrics, name)
    edges = [i / 10 for i in range(11)]
    assert_bins(found.bins, edges, records, lambda r: ((d[quantity], d["accepted"]) for d in drafts(r)))
    n = sum(b.num_drafts for b in found.bins)
    errors = [b.num_drafts / n * abs((b.acceptance.value or 0) - (b.mean or 0)) for b in found.bins]
    assert found.ece.value == pytest.approx(sum(errors))
    gaps = {r.prompt: np.zeros(11) for r in records}
    for r in records:
        for d in drafts(r):
            gaps[r.prompt][int(d[quantity] * 10)] += d["accepted"] - d[quantity]
            gaps[r.prompt][10] += 1
    rows = np.array([gaps[prompt] for prompt in sorted(gaps)])
    assert_same(found.ece, calibration_error(rows[:, :10], rows[:, 10]))


def test_alpha_is_the_overlap_of_the_laws(cell: tuple[list[RequestRecord], list[RequestRecord], CellMetrics]) -> None:
    records, _, metrics = cell
    for i in range(1, K + 1):
        x, y = table(records, lambda r, i=i: ((d["alpha"], 1) for d in drafts(r) if d["position"] == i), 2)
        assert_same(metrics.alpha[i - 1], ratios(x, y, y)[0])


def test_the_check_counts_what_was_reached(
    cell: tuple[list[RequestRecord], list[RequestRecord], CellMetrics],
) -> None:
    records, _, metrics = cell
    check = metrics.check
    assert check is not None
    assert check.num_contexts == sum(len(r.analysis.indices) for r in records if r.analysis is not None)
    assert check.num_other_drafts == sum(r.analysis.num_other_drafts for r in records if r.analysis is not None)
    for i, position in enumerate(check.positions, 1):
        here = [d for r in records for d in drafts(r) if d["position"] == i]
        surplus = sum(d["accepted"] - d["expected"] for d in here)
        deviation = math.sqrt(sum(d["expected"] * (1 - d["expected"]) for d in here))
        assert (position.position, position.num_reached) == (i, len(here))
        assert position.observed == pytest.approx(sum(d["accepted"] for d in here) / len(here))
        assert position.expected == pytest.approx(sum(d["expected"] for d in here) / len(here))
        assert position.z == pytest.approx(surplus / deviation)


def hand_made() -> list[RequestRecord]:
    """Two prompts, the second with two turns."""
    return [
        record(0, [(11, 3, 3), (15, 3, 0), (16, 3, 1)], num_target_forwards=6, num_decode_tokens=9, decode_s=3.0),
        record(4, [(11, 3, 2), (14, 1, 1)], category="b", turn=0, num_target_forwards=3, num_decode_tokens=5),
        record(4, [], category="b", turn=1, num_target_forwards=1, num_decode_tokens=0, decode_s=0.0, ttft_s=1.5),
    ]


def test_figures_by_hand() -> None:
    records = hand_made()
    plain = [
        replace(records[0], decode_s=9.0, num_decode_tokens=9),
        replace(records[1], decode_s=4.0, num_decode_tokens=4),
        replace(records[1], repeat=1, decode_s=100.0),
    ]
    metrics = cell_metrics(CELL_K3, records, plain, [10.0])
    group = metrics.all
    assert [e.value for e in group.conditional] == pytest.approx([4 / 5, 2 / 3, 1 / 2])
    assert [e.value for e in group.unconditional] == pytest.approx([4 / 5, 2 / 4, 1 / 4])
    assert group.mean_acceptance_length.value == pytest.approx(1 + 7 / 5)
    assert group.draft_efficiency.value == pytest.approx(7 / 13)
    assert group.block_efficiency.value == pytest.approx(14 / (5 + 2))
    assert group.tokens_per_s_per_request.value == pytest.approx((9 / 3 + 5 / 2) / 2)
    assert group.speedup.value == pytest.approx(((9 + 4) / (9 + 4)) / ((3 + 2) / (9 + 5)))
    assert group.ttft_s.value == pytest.approx((0.5 + 0.5 + 1.5) / 3)
    assert group.tokens_per_s == Estimate(pytest.approx(2.7), None, None)
    assert (group.num_requests, group.num_verifications) == (3, 5)
    assert {name: g.num_requests for name, g in metrics.categories.items()} == {"a": 1, "b": 2}
    assert metrics.categories["b"].draft_efficiency == Estimate(0.75, None, None)  # one prompt, one cluster
    positions = [(b.low, b.high, b.num_drafts, b.mean, b.acceptance.value) for b in metrics.by_output_position]
    assert positions == [(1, 8, 5, pytest.approx(17 / 5), pytest.approx(4 / 5))]
    assert (metrics.by_entropy, metrics.calibration.bins, metrics.calibration.ece) == ([], [], NO_ESTIMATE)
    assert metrics.check is None
    assert metrics.alpha == [NO_ESTIMATE] * K


def test_bins_are_closed_below_and_a_confidence_of_1_is_in_the_last() -> None:
    at = ints(10 + 1, 10 + 7, 10 + 8, 10 + 16)
    analysis = Analysis(
        ints(0, 1, 2, 3), np.full((4, 1), 0.5), column(0.3, 0.29, 1.0, 0.0), column(0.1, 0.0, 4.0, 9.0),
        np.full((4, 1), 0.5), 0,
    )  # fmt: skip
    records = [replace(record(0, []), starts=at, num_drafted=ints(1, 1, 1, 1), num_accepted=ints(1, 0, 1, 1),
                       analysis=analysis)]  # fmt: skip
    metrics = cell_metrics(replace(CELL_K3, num_speculative_tokens=1), records, [], [1.0])
    assert [b.num_drafts for b in metrics.by_output_position] == [2, 1, 1]
    assert [b.num_drafts for b in metrics.by_entropy] == [1, 1, 0, 0, 0, 0, 0, 2]
    assert [b.num_drafts for b in metrics.calibration.bins] == [1, 0, 1, 1, 0, 0, 0, 0, 0, 1]
    assert metrics.calibration.ece.value == pytest.approx((0.7 + 0.29 + 0 + 1) / 4)


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float64)[:, None]


def test_plain_decoding_has_no_drafts() -> None:
    records = [record(i, [], num_target_forwards=9, num_decode_tokens=8) for i in range(9)]
    metrics = cell_metrics(replace(CELL_K3, num_speculative_tokens=0), records, records, [1.0])
    group = metrics.all
    assert (group.conditional, group.unconditional, metrics.alpha, metrics.by_output_position) == ([], [], [], [])
    assert (group.mean_acceptance_length, group.draft_efficiency) == (NO_ESTIMATE, NO_ESTIMATE)
    assert group.block_efficiency == group.speedup == Estimate(1.0, 1.0, 1.0)
    assert metrics.check is None
    assert cell_metrics(metrics.cell, records, [], [1.0]).all.speedup == NO_ESTIMATE


def test_all_drafts_accepted_is_not_certain() -> None:
    records = [record(i, [(11, 3, 3), (15, 2, 2)]) for i in range(10)]
    group = cell_metrics(CELL_K3, records, [], [1.0]).all
    bound = 0.025 ** (1 / 10)
    for estimate in (*group.conditional, *group.unconditional, group.draft_efficiency):
        assert estimate == Estimate(1.0, pytest.approx(bound), 1.0)
    assert group.mean_acceptance_length == Estimate(3.5, pytest.approx(1 + 2.5 * bound), 3.5)


def test_requests_are_paired_by_prompt_turn_and_repeat() -> None:
    """What makes a request slow does so in both ways of decoding: it cancels, request by request."""
    slow = np.random.default_rng(0).lognormal(0, 1, (12, 2, 2))
    keys = [(p, t, r) for p in range(12) for t in range(2) for r in range(2)]
    records = [record(p, [(11, 3, 1)], turn=t, repeat=r, decode_s=slow[p, t, r]) for p, t, r in keys]
    plain = [replace(r, decode_s=2 * r.decode_s) for r in records]
    assert cell_metrics(CELL_K3, records, plain[::-1], WALL_S).all.speedup == Estimate(
        *[pytest.approx(2.0, rel=1e-9)] * 3
    )


def checked(accepted: list[int], expected: list[float], other: int = 0) -> Check:
    """One prompt with verifications of one draft each."""
    n = len(accepted)
    analysis = Analysis(
        np.arange(n), column(*expected), *(np.full((n, 1), 0.5) for _ in range(3)), num_other_drafts=other
    )
    made = record(0, [(11 + i, 1, a) for i, a in enumerate(accepted)], analysis=analysis)
    check = cell_metrics(replace(CELL_K3, num_speculative_tokens=1), [made], [], [1.0]).check
    assert check is not None
    return check


def test_a_check_fails_beyond_four_standard_deviations() -> None:
    good = checked([1] * 70 + [0] * 30, [0.5] * 100)
    assert good.passed
    assert good.positions[0].z == pytest.approx(4.0)
    assert "100 contexts" in good.message
    assert "|z| 4.0" in good.message
    for accepted, z in ((71, 4.2), (29, -4.2)):
        bad = checked([1] * accepted + [0] * (100 - accepted), [0.5] * 100, other=3)
        assert not bad.passed
        assert bad.positions[0].z == pytest.approx(z)
        assert f"{accepted / 100:.4f} of 100 drafts at position 1 accepted, 0.5000 expected (z = {z})" in bad.message
        assert "3 of the engine's drafts are not the model's" in bad.message


def test_what_is_certain_must_be_so_exactly() -> None:
    assert checked([1, 0, 1], [1.0, 0.0, 1.0]).passed
    assert checked([1, 1, 0], [1.0 + 1e-12, 1.0, -1e-12]).passed  # rounding
    wrong = checked([1, 1, 1], [1.0, 0.0, 1.0])
    assert (wrong.passed, wrong.positions[0].z) == (False, None)
    assert "expected exactly" in wrong.message


def test_positions_that_were_not_drafted_are_not_checked() -> None:
    analysis = Analysis(ints(0), np.array([[0.5, 0.5, np.nan]]), *(np.full((1, K), 0.5) for _ in range(3)), 0)
    check = cell_metrics(CELL_K3, [record(0, [(11, 2, 2)], analysis=analysis)], [], [1.0]).check
    assert check is not None
    assert [p.position for p in check.positions] == [1, 2]


def test_counts_by_prompt_sum_over_turns_and_repeats(
    cell: tuple[list[RequestRecord], list[RequestRecord], CellMetrics],
) -> None:
    records, plain, metrics = cell
    found = metrics.by_prompt
    assert found.prompts == sorted({r.prompt for r in records})
    partners = {(p.prompt, p.turn, p.repeat): p for p in plain}
    for row, prompt in enumerate(found.prompts):
        own = [r for r in records if r.prompt == prompt]
        decided = [pair for r in own for pair in verifications(r)]
        for i in range(1, K + 1):
            assert found.reached[row][i - 1] == sum(k >= i and a >= i - 1 for k, a in decided)
            assert found.accepted[row][i - 1] == sum(a >= i for _, a in decided)
        pairs = [(r, partners[key]) for r in own if (key := (r.prompt, r.turn, r.repeat)) in partners]
        assert found.decode_s[row] == pytest.approx(sum(r.decode_s for r, _ in pairs), abs=1e-7)
        assert found.plain_decode_s[row] == pytest.approx(sum(p.decode_s for _, p in pairs), abs=1e-7)
        assert found.decode_tokens[row] == sum(r.num_decode_tokens for r, _ in pairs)
        assert found.plain_decode_tokens[row] == sum(p.num_decode_tokens for _, p in pairs)


@pytest.mark.parametrize(("num_loop_tokens", "warned"), [(0, False), (4, False), (5, True), (10, True)])
def test_loops_are_warned_of_beyond_a_fifth_of_the_tokens(num_loop_tokens: int, warned: bool) -> None:
    records = [record(i, [], num_output_tokens=10, num_loop_tokens=n) for i, n in enumerate((num_loop_tokens, 0))]
    metrics = cell_metrics(CELL_K3, records, [], [1.0])
    assert metrics.all.final_loop_share.value == pytest.approx(num_loop_tokens / 20)
    assert len(metrics.warnings) == warned
    for warning in metrics.warnings:
        assert f"{num_loop_tokens / 20:.1%} of the output tokens lie in final loops, more than 20%" in warning
        assert "repeating text" in warning


def test_a_cell_reads_as_results_json_wants_it() -> None:
    records, plain = random_records(0)
    for made in (
        cell_metrics(CELL_K3, records, plain, WALL_S),
        cell_metrics(CELL_K3, hand_made(), [], [1.0]),
        cell_metrics(CELL_K3.plain, [record(0, [])], [], [1.0]),
    ):
        document = made.as_dict()
        assert list(_faults(document, CELL, "")) == []
        assert json.loads(json.dumps(document, allow_nan=False)) == document == finite(document)
    assert list(document)[:5] == [
        "temperature", "batch_size", "verification", "draft_sampling", "num_speculative_tokens"
    ]  # fmt: skip


def test_the_order_of_the_records_does_not_matter() -> None:
    """Not in the last digit."""
    records, plain = random_records(2)
    generator = np.random.default_rng(0)
    again = [records[i] for i in generator.permutation(len(records))]
    assert cell_metrics(CELL_K3, again, plain[::-1], WALL_S) == cell_metrics(CELL_K3, records, plain, WALL_S)


def test_sums_by_request_keep_the_order_of_the_records() -> None:
    records, _ = random_records(1)
    sums = Sums.of(records, [], K)
    assert sums.verifications[:, 0].tolist() == [len(r.starts) for r in records]
    assert sums.accepted.sum(1).tolist() == [r.num_accepted.sum() for r in records]
