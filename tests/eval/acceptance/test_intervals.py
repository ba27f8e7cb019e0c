"""Intervals: each against a plain loop over the same draws, what is special by hand, and coverage over 4,000 runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from specdec.eval.acceptance import intervals
from specdec.eval.acceptance.compare import minus
from specdec.eval.acceptance.intervals import (
    FEW,
    NO_ESTIMATE,
    STUDENT,
    Estimate,
    Quotients,
    calibration_error,
    paired_differences,
    paired_ratios,
    ratios,
)
from specdec.eval.acceptance.records import Floats
from support.interval_coverage import (
    SCENARIOS,
    Requests,
    calibration_coverage,
    coverage,
    percentile,
    simulate,
)


def draws(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(n, size=(1999, n))


def column(*values: float) -> Floats:
    return np.array(values, np.float64)[:, None]


def only(estimates: list[Estimate]) -> Estimate:
    (estimate,) = estimates
    return estimate


def assert_close(estimate: Estimate, value: float, low: float, high: float) -> None:
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((value, low, high), rel=1e-9)


def bootstrap_t(
    n: int, value_and_error: Callable[[list[int]], tuple[float, float]], seed: int = 0
) -> tuple[float, float]:
    """One resample after the other. value_and_error: of the clusters with these indices."""
    value, error = value_and_error(list(range(n)))
    t = []
    for chosen in draws(n, seed).tolist():
        again, error_again = value_and_error(chosen)
        t.append((again - value) / error_again)
    t.sort()
    return value - t[1949] * error, value - t[49] * error


def ratio_and_error(x: list[float], y: list[float], chosen: list[int]) -> tuple[float, float]:
    n, ratio = len(chosen), sum(x[i] for i in chosen) / sum(y[i] for i in chosen)
    squares = sum((x[i] - ratio * y[i]) ** 2 for i in chosen)
    return ratio, math.sqrt(n / (n - 1) * squares) / sum(y[i] for i in chosen)


def acceptances(n: int, seed: int) -> tuple[list[float], list[float]]:
    generator = np.random.default_rng(seed)
    reached = generator.integers(5, 60, n)
    return generator.binomial(reached, generator.beta(4, 2, n)).tolist(), reached.tolist()


@pytest.mark.parametrize("n", [8, 20, 33])
def test_a_ratio_has_the_limits_of_a_plain_bootstrap_t(n: int) -> None:
    x, y = acceptances(n, n)
    low, high = bootstrap_t(n, lambda chosen: ratio_and_error(x, y, chosen))
    assert_close(only(ratios(column(*x), column(*y))), sum(x) / sum(y), low, high)
    assert_close(only(ratios(column(*x), column(*y), column(*y))), sum(x) / sum(y), low, min(high, 1.0))


def test_the_seed_decides_the_draws() -> None:
    x, y = acceptances(20, 0)
    first, again, other = (only(ratios(column(*x), column(*y), seed=seed)) for seed in (3, 3, 4))
    low, high = bootstrap_t(20, lambda chosen: ratio_and_error(x, y, chosen), seed=3)
    assert_close(first, sum(x) / sum(y), low, high)
    assert first == again != other


def test_a_paired_ratio_has_the_limits_of_a_plain_bootstrap_t() -> None:
    n, generator = 15, np.random.default_rng(1)
    tokens = generator.integers(20, 200, (2, n)).astype(float)
    seconds = generator.lognormal(0, 0.8, n) * tokens * np.array([[1.0], [0.6]]) * generator.lognormal(0, 0.05, (2, n))

    def value_and_error(chosen: list[int]) -> tuple[float, float]:
        plain_s, s, plain_tokens, own_tokens = (
            sum(row[i] for i in chosen) for row in (*seconds.tolist(), *tokens.tolist())
        )
        speedup = (plain_s / plain_tokens) / (s / own_tokens)
        influences = [
            seconds[0, i] / plain_s - tokens[0, i] / plain_tokens - seconds[1, i] / s + tokens[1, i] / own_tokens
            for i in chosen
        ]
        return speedup, speedup * math.sqrt(n / (n - 1) * sum(f**2 for f in influences))

    columns = [row[:, None] for row in (seconds[0], tokens[0], seconds[1], tokens[1])]
    estimate = only(paired_ratios(*columns))
    value, _ = value_and_error(list(range(n)))
    assert_close(estimate, value, *bootstrap_t(n, value_and_error))
    assert estimate.low is not None
    assert estimate.high is not None
    shuffled = only(paired_ratios(columns[0][::-1], columns[1][::-1], *columns[2:]))
    assert shuffled.low is not None
    assert shuffled.high is not None
    assert shuffled.high - shuffled.low > 1.5 * (estimate.high - estimate.low)  # unpaired, requests' own speed counts


def beta_runs(
    shape: tuple[float, float], n: int, num_runs: int, loss: float = 0.0, seed: int = 0
) -> tuple[Quotients, Quotients]:
    """Pairs of runs over prompts that differ in acceptance ~ Beta(shape), the same in both, in B less by `loss`."""
    generator = np.random.default_rng(seed)
    likely, made = generator.beta(*shape, (n, num_runs)), []
    for share in (1.0, 1 - loss):
        reached = generator.integers(10, 120, likely.shape)
        accepted = generator.binomial(reached, share * likely)
        made.append(Quotients(np.stack([accepted, reached]).astype(np.float64), reached.astype(np.float64)))
    return made[0], made[1]


def difference_by_loop(
    a: list[list[float]], b: list[list[float]], share: float, t: float
) -> tuple[float, float, float]:
    """rows of a and b: (x, y) or (x, y, u, v) of one cluster. The standard error by infinitesimal weights."""

    def value(rows: list[list[float]], weights: list[float]) -> float:
        x, y, *others = (sum(w * row[k] for w, row in zip(weights, rows)) for k in range(len(rows[0])))
        return x / y / (others[0] / others[1]) if others else x / y

    def difference(weights: list[float]) -> float:
        return value(b, weights) - share * value(a, weights)

    n, step = len(a), 1e-6
    ones = [1.0] * n
    slopes = []
    for i in range(n):
        up, down = ones.copy(), ones.copy()
        up[i], down[i] = 1 + step, 1 - step
        slopes.append((difference(up) - difference(down)) / (2 * step))
    error = math.sqrt(n / (n - 1) * sum(slope**2 for slope in slopes))
    return difference(ones), difference(ones) - t * error, difference(ones) + t * error


def assert_close_to(estimate: Estimate, wanted: tuple[float, float, float]) -> None:
    assert vars(estimate) == pytest.approx(dict(zip(("value", "low", "high"), wanted)), rel=1e-3)


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_a_paired_difference_is_linearised(share: float) -> None:
    n, quantile = 12, {12: 2.201, 11: 2.228, 10: 2.262}  # by clusters that inform about both
    a, b = beta_runs((4, 2), n, 3, loss=0.2)
    a.factors[:, 3, 1] = a.most[3, 1] = b.factors[:, 3, 1] = b.most[3, 1] = 0  # no data: as if it were not there
    b.factors[:, 5, 2] = b.most[5, 2] = 0  # none in B alone
    for column, estimate in enumerate(paired_differences(a, b, share)):
        rows = [q.factors[:, :, column].T.tolist() for q in (a, b)]
        kept = [i for i in range(n) if rows[0][i][1] + rows[1][i][1] > 0]
        some = [min(sum(x > 0 for x, _ in run), sum(x < y for x, y in run)) for run in rows]
        wanted = difference_by_loop(*([run[i] for i in kept] for run in rows), share, quantile[min(some)])
        assert_close_to(estimate, wanted)


def test_a_paired_difference_of_quotients_of_quotients_is_linearised() -> None:
    generator = np.random.default_rng(3)
    factors = generator.lognormal(0, 0.5, (2, 4, 10, 1))
    a, b = (Quotients(f, np.full((10, 1), np.inf)) for f in factors)
    wanted = difference_by_loop(*(f[:, :, 0].T.tolist() for f in factors), 1.0, 2.262)
    assert_close_to(only(paired_differences(a, b)), wanted)


def test_paired_differences_without_enough_to_go_by() -> None:
    """Nothing to divide by: no value. Fewer than two clusters that inform about both: no interval. No difference: the
    point."""
    a, b = beta_runs((4, 2), 10, 1)
    assert only(paired_differences(a, a)) == Estimate(0.0, 0.0, 0.0)
    everything = Quotients(np.stack([a.most, a.most]), a.most)
    assert only(paired_differences(everything, b)).low is None
    assert only(paired_differences(b, everything)).low is None
    assert only(paired_differences(b, everything)).value is not None
    but_one = everything.factors.copy()
    but_one[0, 0] -= 1
    assert only(paired_differences(Quotients(but_one, a.most), b)).low is None
    but_one[0, 1] -= 1
    assert only(paired_differences(Quotients(but_one, a.most), b)).low is not None
    nothing = Quotients(np.zeros((2, 10, 1)), np.zeros((10, 1)))
    assert only(paired_differences(a, nothing)) == NO_ESTIMATE


@pytest.mark.parametrize(
    ("n", "quantile"), [(2, 12.706), (8, 2.365), (9, 2.306), (12, 2.201), (36, 2.030), (96, 1.985), (10**6, 1.960)]
)
def test_quantiles_of_student_s_t(n: int, quantile: float) -> None:
    assert intervals._student(n) == pytest.approx(quantile, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(5, 2.5), (1.5, 0.7), (30, 1.5), (1, 6)])
@pytest.mark.parametrize(("n", "loss"), [(8, 0.0), (36, 0.1), (96, 0.0)])
def test_paired_intervals_hold_the_truth_and_are_narrower(shape: tuple[float, float], n: int, loss: float) -> None:
    """In 93.5 to 98 % of 2,000 runs; less wide than what independent runs would need."""
    a, b = beta_runs(shape, n, 2000, loss)
    truth = -loss * shape[0] / sum(shape)
    found = [(e.low, e.high) for e in paired_differences(a, b) if e.low is not None and e.high is not None]
    assert len(found) > 1990
    assert 0.935 <= np.mean([low <= truth <= high for low, high in found]) <= 0.98
    alone = [ratios(*q.factors[:, :, :200], q.most[:, :200]) for q in (a, b)]
    independent = [minus(of_b, of_a) for of_a, of_b in zip(*alone)]
    wide = np.median([e.high - e.low for e in independent if e.low is not None and e.high is not None])
    assert np.median([high - low for low, high in found]) < 0.8 * wide


def test_many_ratios_are_those_of_each_one() -> None:
    """Columns of all kinds: with clusters without data, with one cluster, none, few, nothing or everything accepted."""
    generator = np.random.default_rng(2)
    y = generator.integers(1, 9, (30, 9)).astype(float)
    x = np.minimum(generator.integers(0, 9, y.shape), y)
    y[:, 1] *= np.arange(30) % 3 > 0
    y[:, 2] *= np.arange(30) == 7
    y[:, 3] = 0
    y[:, 4] *= np.arange(30) < 5
    x[:, 5], x[:, 6], x[:, 7] = 0, y[:, 6], y[:, 7] / 2
    x[3:, 8] = 0
    x = np.minimum(x, y)
    for most in (y, np.full_like(y, np.inf)):
        for i, estimate in enumerate(ratios(x, y, most)):
            alone = only(ratios(x[:, i : i + 1], y[:, i : i + 1], most[:, i : i + 1]))
            assert (estimate.value is None, estimate.low is None) == (alone.value is None, alone.low is None)
            known = {name: x for name, x in vars(alone).items() if x is not None}
            assert {name: getattr(estimate, name) for name in known} == pytest.approx(known, rel=1e-9)


def test_memory_is_bounded_without_changing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = acceptances(20, 5)
    whole = only(ratios(column(*x), column(*y)))
    error = calibration_error(column(*x) / 50 - 0.3, np.array(y))
    monkeypatch.setattr(intervals, "BLOCK", 777)
    assert vars(only(ratios(column(*x), column(*y)))) == pytest.approx(vars(whole), rel=1e-12)
    assert vars(calibration_error(column(*x) / 50 - 0.3, np.array(y))) == pytest.approx(vars(error), rel=1e-12)


def test_clusters_without_data_do_not_count() -> None:
    x, y = acceptances(12, 6)
    with_empty = ratios(column(*x, 0, 0, 0, 0), column(*y, 0, 0, 0, 0), column(*y, 0, 0, 0, 0))
    assert with_empty == ratios(column(*x), column(*y), column(*y))


def test_without_data_there_is_no_value_and_with_one_cluster_no_interval() -> None:
    assert ratios(column(0, 0), column(0, 0)) == [NO_ESTIMATE]
    assert ratios(np.zeros((0, 2)), np.zeros((0, 2))) == [NO_ESTIMATE] * 2
    assert ratios(np.zeros((4, 0)), np.zeros((4, 0))) == []
    assert ratios(column(3, 0), column(4, 0), column(4, 0)) == [Estimate(0.75, None, None)]
    assert paired_ratios(column(6), column(2), column(2), column(4)) == [Estimate(6.0, None, None)]
    assert paired_ratios(*[column(0, 0)] * 4) == [NO_ESTIMATE]
    assert calibration_error(np.zeros((3, 10)), np.zeros(3)) == NO_ESTIMATE
    assert calibration_error(np.array([[1.0, -2.0], [0, 0]]), np.array([6.0, 0])) == Estimate(0.5, None, None)


def test_few_clusters_have_students_t() -> None:
    """On the scale of the log without a limit, of the log-odds with one."""
    x, y = [5.0, 9.0, 4.0], [8.0, 10.0, 9.0]
    value, error = ratio_and_error(x, y, [0, 1, 2])
    factor = math.exp(4.303 * error / value)
    assert_close(only(ratios(column(*x), column(*y))), value, value / factor, value * factor)
    reach = math.exp(4.303 * error / (value * (1 - value)))
    odds = value / (1 - value)
    low, high = (o / (1 + o) for o in (odds / reach, odds * reach))
    assert_close(only(ratios(column(*x), column(*y), column(*y))), value, low, high)


def test_students_t_is_tabulated_for_its_degrees_of_freedom() -> None:
    """P(|T| > t) = 5 %, by integrating the density."""
    for freedom, t in enumerate(STUDENT, 1):
        angle = np.linspace(0, math.atan(t / math.sqrt(freedom)), 20_001)  # x = sqrt(freedom) tan(angle)
        norm = math.gamma((freedom + 1) / 2) / (math.sqrt(math.pi) * math.gamma(freedom / 2))
        middle = (angle[1:] + angle[:-1]) / 2
        assert 2 * norm * (np.cos(middle) ** (freedom - 1) * np.diff(angle)).sum() == pytest.approx(0.95, abs=5e-5)
    assert len(STUDENT) == FEW - 1


@pytest.mark.parametrize("rejected", [False, True])
def test_few_clusters_with_anything_accepted_or_rejected_have_students_t(rejected: bool) -> None:
    n = 40
    few = [2.0 if i < FEW - 1 else 0.0 for i in range(n)]
    x, y = [10 - f if rejected else f for f in few], [10.0] * n
    value, error = ratio_and_error(x, y, list(range(n)))
    reach, odds = math.exp(STUDENT[-1] * error / (value * (1 - value))), value / (1 - value)
    low, high = (o / (1 + o) for o in (odds / reach, odds * reach))
    assert_close(only(ratios(column(*x), column(*y), column(*y))), value, low, high)


@pytest.mark.parametrize("n", [2, 10, 100])
def test_nothing_or_everything_accepted_is_not_certain(n: int) -> None:
    """As wide as n clusters of one kind leave it: the others have a share of 0.025^(1/n) at least."""
    y = np.full((n, 1), 7.0)
    bound = 0.025 ** (1 / n)
    assert_close(only(ratios(0 * y, y, y)), 0.0, 0.0, 1 - bound)
    assert_close(only(ratios(y, y, y)), 1.0, bound, 1.0)
    assert_close(only(ratios(3 * y, y, 3 * y)), 3.0, 3 * bound, 3.0)  # accepted per verification
    assert only(ratios(0 * y, y)) == Estimate(0.0, None, None)  # unlimited: nothing is known


@pytest.mark.parametrize("n", [4, 30])
def test_the_same_in_all_clusters_is_a_point(n: int) -> None:
    y = np.arange(1.0, n + 1)[:, None]
    assert_close(only(ratios(y / 3, y, y)), 1 / 3, 1 / 3, 1 / 3)
    assert_close(only(ratios(y, y)), 1.0, 1.0, 1.0)
    assert_close(only(paired_ratios(y**2, y, y**2, y)), 1.0, 1.0, 1.0)


def test_limits_stay_where_the_quantity_can_be() -> None:
    """One cluster of nine is unlike the others, which say nothing about how unlike: the bootstrap reaches beyond."""
    y = column(*[10.0] * 9)
    assert only(ratios(column(10, *[0.5] * 8), y, y)).high == 1.0
    assert only(ratios(column(0, *[9.5] * 8), y, y)).low == 0.0


def calibration_by_loop(gaps: Floats, counts: Floats) -> tuple[float, float, float]:
    n, bins = gaps.shape
    means = [gaps[:, b].sum() / counts.sum() for b in range(bins)]
    deviations = [
        [math.sqrt(n / (n - 1)) * (gaps[chosen, b].sum() / counts[chosen].sum() - means[b]) for b in range(bins)]
        for chosen in draws(n)
    ]
    sure = [abs(means[b]) > 2 * np.std([d[b] for d in deviations]) for b in range(bins)]
    assert {True, False} == set(sure)
    up = sorted(sum(d[b] * np.sign(means[b]) if sure[b] else abs(d[b]) for b in range(bins)) for d in deviations)
    down = sorted(sum(-d[b] * np.sign(means[b]) if sure[b] else abs(d[b]) for b in range(bins)) for d in deviations)
    value = sum(map(abs, means))
    return value, max(0, value - up[1949]), min(1, value + down[1949])


def test_a_calibration_error_is_bounded_by_the_gaps() -> None:
    generator = np.random.default_rng(8)
    counts = generator.integers(5, 40, 24).astype(float)
    gaps = counts[:, None] * np.array([0.1, 0.002, -0.05, 0.0]) + generator.standard_normal((24, 4))
    with_empty = calibration_error(np.vstack([gaps, np.zeros((3, 4))]), np.append(counts, [0, 0, 0]))
    assert_close(with_empty, *calibration_by_loop(gaps, counts))
    calibrated = calibration_error(generator.standard_normal((24, 4)), counts)
    assert calibrated.value is not None
    assert calibrated.value > 0
    assert calibrated.low == 0
    assert calibration_error(counts[:, None] * [[0.99]] + generator.standard_normal((24, 1)), counts).high == 1


def test_an_estimate_says_itself() -> None:
    assert Estimate(1.0, None, None).plus(1).as_dict() == {"value": 2.0, "low": None, "high": None}
    assert Estimate(0.5, 0.25, 1.0).plus(1) == Estimate(1.5, 1.25, 2.0)
    assert NO_ESTIMATE.plus(1) == NO_ESTIMATE


@cache
def population() -> Requests:
    return simulate(20_000, SCENARIOS["moderate"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "conditional acceptance 1",
        "conditional acceptance 3",
        "unconditional acceptance 3",
        "mean acceptance length",
        "block efficiency",
        "tokens/s per request",
        "speed-up",
    ],
)
def test_95_percent_intervals_of_96_requests_hold_the_truth_in_94_to_96_percent_of_runs(name: str) -> None:
    found = coverage(population().statistics[name], 96, runs=4000)
    assert 0.94 <= found.covered <= 0.96, found
    assert max(found.above, found.below) <= 0.04, found  # neither side alone


def test_percentile_intervals_of_few_requests_do_not() -> None:
    """Why they were not chosen, and that coverage can be too low."""
    statistic = population().statistics["mean acceptance length"]
    assert coverage(statistic, 16, 1000, percentile).covered < 0.925 < coverage(statistic, 16, 1000).covered


@pytest.mark.slow
def test_the_interval_of_a_calibration_error_holds_the_truth() -> None:
    assert calibration_coverage(population(), 96, 500).covered >= 0.94
