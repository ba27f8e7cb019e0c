"""Computes 95 % intervals: a studentised bootstrap over clusters.

A cluster is a prompt with all of its turns and repeats: whatever depends on each other lies in one cluster. Statistics
are ratios of sums over clusters: an acceptance is drafts accepted over drafts reached, and both of them are random.

**Method.** Bootstrap-t (Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 12.5): clusters are drawn
with replacement `NUM_RESAMPLES` times; the quantiles of (resample - estimate) / standard error of the resample say how
many standard errors of the estimate its interval reaches. Standard errors are linearised: R = sum x / sum y has
sqrt(n / (n - 1) sum e^2) / sum y, e = x - R y; those of products of ratios follow likewise. Limits are cut at what the
quantity can be. Chosen by measurement over 4,000 runs of simulated requests in four scenarios, with
`python tests/interval_coverage.py`; percentile and BCa intervals are quantiles of the resamples themselves:

    requests (clusters)         8            16           32           96
    bootstrap-t             90 to 95.5   92 to 97     93 to 96.5   94 to 96    % of intervals hold the truth
    BCa                     79 to 91     86 to 94     89 to 95     92 to 96
    percentile              76 to 89     83 to 92     88 to 94     91 to 95

What is lacking at 8 to 32 are positions 2 and 3 where few drafts are accepted; else it is 92, 93.5, 93.8 % and more.

**Where there is little to draw from.**

- Clusters without data for a statistic, say without a draft at position 5, do not count for that statistic.
- No cluster: no value. One: no interval.
- Fewer than `FEW` clusters, or fewer than `FEW` with anything accepted, or with anything rejected: resamples repeat few
  values. Student's t with the linearised standard error instead, on the scale of the logarithm, or of the log-odds
  where the quantity has an upper limit. Repeats of a cell, over which its total speed varies, are this few. With 4
  clusters it covers 88 to 97 %, near acceptance 0 up to 99 %.
- Nothing accepted, or everything: all resamples agree, and yet the next prompt may be of another kind. With n clusters
  of one kind the share of the other kind is at most 1 - 0.025^(1/n) (Clopper and Pearson 1934); if all drafts of those
  went the other way, an acceptance of 1 would still be at least 0.025^(1/n), 0.69 for 10 clusters and 0.96 for 100.
  That assumes clusters of like size and nothing about the drafts within one: wide as it has to be, it covers more
  than 95 %.
- The same ratio in all clusters, neither 0 nor 1: the interval is the point. Plain decoding's block efficiency is 1.

**Differences** of two runs over the same clusters (`paired_differences`) are nearly symmetric, whatever the ratios are:
Student's t with the linearised standard error of the difference, in which what is easy for both runs cancels. Over
2,000 runs of prompts with acceptance ~ Beta, 4 to 96 of them, it covers 94 to 96 %, and more where most prompts accept
everything or nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from specdec.eval.acceptance.records import Floats, Ints

NUM_RESAMPLES = 1999
TAILS = [49, 1949]  # of 1999 in order: 2.5 and 97.5 % of 1999 + 1
TAIL = 0.025
FEW = 8
NORMAL = 1.959964  # 97.5 % quantile of the normal distribution
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)  # 97.5 % quantile for 1, 2, ... degrees of freedom
SAME = 1e-12  # a relative standard error that is rounding
SURE = 2.0  # standard errors from 0 at which the sign of a calibration gap counts as known
BEYOND = 1e100  # standard errors: outside of whatever the quantity can be
BLOCK = 2**21  # numbers of one kind in memory at once


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float | None
    """The value; None without data."""
    low: float | None
    """The interval's lower limit; None without data or from one cluster."""
    high: float | None
    """The interval's upper limit; None without data or from one cluster."""

    def as_dict(self) -> dict[str, float | None]:
        """Returns a document for JSON."""
        return asdict(self)

    def plus(self, constant: float) -> Estimate:
        """Returns the estimate of the quantity plus a constant."""
        return Estimate(*(None if x is None else x + constant for x in (self.value, self.low, self.high)))


NO_ESTIMATE = Estimate(None, None, None)


def ratios(numerators: Floats, denominators: Floats, most: Floats | None = None, seed: int = 0) -> list[Estimate]:
    """Returns estimates of m ratios: the sum of numerators over the sum of denominators, over n clusters.

    numerators, denominators: [n, m], at least 0.
    most: [n, m], what each numerator can be at most; of an acceptance, its denominator. None: there is no such limit.
    seed: of the resamples.
    """
    most = np.full_like(numerators, np.inf) if most is None else most
    values, limits = _ratio(numerators, denominators), np.full((2, numerators.shape[1]), np.nan)
    for chosen, (x, y, z) in _of_equal_size(denominators > 0, numerators, denominators, most):
        limits[:, chosen] = _limits_of_ratios(x, y, z, seed)
    return _estimates(values, limits)


@dataclass(frozen=True, eq=False)
class Quotients:
    """m figures of one run as sums over n clusters: sum x / sum y, or (sum x / sum y) / (sum u / sum v)."""

    factors: Floats
    """[2 or 4, n, m]: x, y and, if there are four, u, v; none is negative."""
    most: Floats
    """[n, m]: what x can be at most; infinite where there is no limit."""

    @property
    def values(self) -> Floats:
        """The figures [m]; NaN where there is nothing to divide by."""
        x, y, *others = self.factors
        return _ratio(_ratio(x, y), _ratio(*others)) if others else _ratio(x, y)

    @property
    def influences(self) -> Floats:
        """n times how each cluster moves each figure, to first order, [n, m]; they add up to 0 over the clusters."""
        means = self.factors.mean(1, keepdims=True)
        shares = np.divide(self.factors, means, out=np.zeros_like(self.factors), where=means > 0)
        powers = np.array([1.0, -1.0, -1.0, 1.0])[: len(shares)]
        return self.values * np.tensordot(powers, shares, 1)

    @property
    def informative(self) -> Ints:
        """Number of clusters with anything of x, or of those with less of it than there can be, whichever are fewer,
        [m]."""
        x = self.factors[0]
        return np.minimum((x > 0).sum(0), (x < self.most).sum(0))


def paired_differences(a: Quotients, b: Quotients, share: float = 1.0) -> list[Estimate]:
    """Returns estimates of b - share * a, figure by figure; cluster i of both runs is the same one.

    The standard error is sqrt(sum d^2 / (n (n - 1))), d the difference of a cluster's influences, n the clusters with
    data. Student's t has one degree of freedom less than there are clusters that inform about both figures; with fewer
    than two of them there is no interval.
    """
    values = b.values - share * a.values
    n = ((a.factors > 0).any(0) | (b.factors > 0).any(0)).sum(0)
    influences = (b.influences - share * a.influences) * n / max(len(a.most), 1)
    informative = np.minimum(np.minimum(a.informative, b.informative), n)
    error = np.sqrt((influences**2).sum(0) / np.maximum(n * (n - 1), 1))
    reach = error * np.array([_student(int(count)) for count in informative])
    return _estimates(values, np.stack([values - reach, values + reach]))


def paired_ratios(x: Floats, y: Floats, u: Floats, v: Floats, seed: int = 0) -> list[Estimate]:
    """Returns estimates of m figures (sum x / sum y) / (sum u / sum v).

    x, y, u, v: [n, m], at least 0; row i of all four is one cluster.
    seed: of the resamples.
    """
    values, limits = _ratio(_ratio(x, y), _ratio(u, v)), np.full((2, x.shape[1]), np.nan)
    powers = np.array([1.0, -1.0, -1.0, 1.0])
    for chosen, blocks in _of_equal_size((x > 0) | (y > 0) | (u > 0) | (v > 0), x, y, u, v):
        unlimited, all_clusters = np.full(len(chosen), np.inf), np.full(len(chosen), len(blocks[0]))
        limits[:, chosen] = _limits(values[chosen], np.stack(blocks), powers, unlimited, all_clusters, seed)
    return _estimates(values, limits)


def calibration_error(gaps: Floats, counts: Floats, seed: int = 0) -> Estimate:
    """Returns the estimate of the sum over bins |sum of gaps| / sum of counts.

    gaps: [n, bins], outcomes - confidences, summed over a cluster's drafts in that bin.
    counts: [n], a cluster's drafts in all bins.
    seed: of the resamples.

    Noise makes every |gap| larger, so that resamples of a calibrated model's error lie above the truth, all of them,
    and the bootstrap of `ratios` fails. Here the error's deviation is bounded by those of the gaps: deviation times
    sign where the sign is certain (`SURE` standard errors), its absolute value elsewhere. Covers 94 to 97 % with 96
    clusters, more where signs are uncertain (a calibrated model's are); 90 to 98 % with 16, 87 to 98 % with fewer.
    """
    gaps, counts = gaps[counts > 0], counts[counts > 0]
    n = len(counts)
    if n == 0:
        return NO_ESTIMATE
    means = gaps.sum(0) / counts.sum()  # [bins]
    value = float(np.abs(means).sum())
    if n == 1:
        return Estimate(value, None, None)
    resamples = [(w @ gaps) / (w @ counts)[:, None] for w in _resamples(n, gaps.shape[1], seed)]
    deviations = (np.concatenate(resamples) - means) * np.sqrt(n / (n - 1))  # [NUM_RESAMPLES, bins]
    sure = np.abs(means) > SURE * deviations.std(0)
    certain = (deviations * np.sign(means))[:, sure].sum(1)
    uncertain = np.abs(deviations[:, ~sure]).sum(1)
    too_high, too_low = _tails(uncertain + certain)[1], _tails(uncertain - certain)[1]
    return Estimate(value, max(0.0, value - float(too_high)), min(1.0, value + float(too_low)))


def _student(n: int) -> float:
    """Returns the 97.5 % quantile of Student's t with n - 1 degrees of freedom, to 0.001 (Cornish and Fisher 1938); NaN
    for n < 2."""
    if n < 2:
        return math.nan
    if n - 1 <= len(STUDENT):
        return STUDENT[n - 2]
    z, degrees = NORMAL, n - 1
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def _ratio(numerators: Floats, denominators: Floats) -> Floats:
    """Returns the quotients [m] of sums over clusters [n, m], or of numbers [m]; NaN where there is nothing to divide
    by.
    """
    x, y = (a.sum(0) if a.ndim == 2 else a for a in (numerators, denominators))
    return np.divide(x, y, out=np.full(len(x), np.nan), where=y > 0)


def _of_equal_size(active: NDArray[np.bool_], *arrays: Floats) -> Iterator[tuple[Ints, list[Floats]]]:
    """Yields columns with the same number of active clusters, two at least: which, and each array's rows of those
    clusters alone."""
    sizes = active.sum(0)
    for n in np.unique(sizes[sizes > 1]):
        chosen = np.flatnonzero(sizes == n)
        rows = np.argsort(~active[:, chosen], axis=0, kind="stable")[:n]
        yield chosen, [np.take_along_axis(array[:, chosen], rows, 0) for array in arrays]


def _limits_of_ratios(x: Floats, y: Floats, most: Floats, seed: int) -> Floats:
    """Returns the limits [2, m] of sum x / sum y."""
    total, largest = x.sum(0), most.sum(0)
    value, ceiling = total / y.sum(0), (most / y).max(0)
    nothing, everything = total == 0, total == largest
    informative = np.minimum((x > 0).sum(0), (x < most).sum(0))
    factors = np.stack([np.where(nothing, 1.0, x), y])
    low, high = _limits(value, factors, np.array([1.0, -1.0]), ceiling, informative, seed)
    of_the_same_kind = TAIL ** (1 / len(x))
    at_most = np.where(np.isfinite(ceiling), ceiling * (1 - of_the_same_kind), np.nan)
    low = np.select([nothing, everything], [np.where(np.isnan(at_most), np.nan, 0.0), value * of_the_same_kind], low)
    return np.stack([low, np.select([nothing, everything], [at_most, ceiling], high)])


def _limits(
    value: Floats, factors: Floats, powers: Floats, ceiling: Floats, informative: Ints, seed: int
) -> tuple[Floats, Floats]:
    """Returns the lower and the upper limits [m] of products over k of (sum of factors[k] over the clusters) **
    powers[k].

    value: [m], the products.
    factors: [factors, n, m].
    powers: [factors], which sum to 0.
    ceiling: [m], what the values can be at most.
    informative: [m], clusters that inform.
    seed: of the resamples.
    """
    n = factors.shape[1]
    shares = factors / factors.mean(1, keepdims=True)
    influence = np.tensordot(powers, shares, 1)  # [n, m], of the value's logarithm
    error = np.sqrt((influence**2).mean(0) / (n - 1))  # relative
    low, high = _students(value, error, ceiling, STUDENT[min(n - 1, len(STUDENT)) - 1])
    if n >= FEW:
        smallest, largest = _studentised(shares, powers, seed)
        enough = informative >= FEW
        low = np.where(enough, np.maximum(value * (1 - largest * error), 0), low)
        high = np.where(enough, np.minimum(value * (1 - smallest * error), ceiling), high)
    same = error < SAME
    return np.where(same, value, low), np.where(same, value, high)


def _students(value: Floats, error: Floats, ceiling: Floats, t: float) -> tuple[Floats, Floats]:
    """Returns limits that are symmetric on the scale of log(value / (1 - value / ceiling)), from relative standard
    errors."""
    room = np.maximum(1 - value / ceiling, np.finfo(float).eps)
    reach = np.exp(np.minimum(t * error / room, 600.0))
    odds = value / room
    return odds / reach / (1 + odds / reach / ceiling), odds * reach / (1 + odds * reach / ceiling)


def _studentised(shares: Floats, powers: Floats, seed: int) -> Floats:
    """Returns the 2.5 and 97.5 % quantiles of (resample - value) / standard error of the resample, [2, m]. shares:
    factors over their means."""
    count, n, m = shares.shape
    deviations = []
    for weights in _resamples(n, m, seed):
        means = weights @ shares  # [factors, resamples, m]
        with np.errstate(divide="ignore", invalid="ignore"):  # in a resample nothing may be accepted, or all the same
            variance = sum(
                powers[k] * powers[j] * (weights @ (shares[k] * shares[j])) / (means[k] * means[j])
                for k, j in itertools.product(range(count), repeat=2)
            )
            relative = np.prod(means ** powers[:, None, None], axis=0)
            t = (relative - 1) / (relative * np.sqrt(np.maximum(variance, 0) / (n - 1)))
        deviations.append(np.nan_to_num(t, nan=-BEYOND, posinf=BEYOND, neginf=-BEYOND))  # NaN: nothing was accepted
    return _tails(np.concatenate(deviations))


def _resamples(n: int, m: int, seed: int) -> Iterator[Floats]:
    """Yields `NUM_RESAMPLES` draws of n clusters, some at a time: each cluster's share of the draw, [draws, n]. They
    are the same for every m, the number of statistics that they are for."""
    generator = np.random.default_rng(seed)
    most = max(1, BLOCK // max(n, m))
    for start in range(0, NUM_RESAMPLES, most):
        draws = min(most, NUM_RESAMPLES - start)
        chosen = generator.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
        yield np.bincount(chosen.ravel(), minlength=draws * n).reshape(draws, n) / n


def _tails(resamples: Floats) -> Floats:
    """Returns the 2.5 and 97.5 % quantiles over the first dimension."""
    return np.partition(resamples, TAILS, axis=0)[TAILS]


def _estimates(values: Floats, limits: Floats) -> list[Estimate]:
    rows = np.stack([values, *limits], 1).tolist()
    return [Estimate(*(x if np.isfinite(x) else None for x in row)) for row in rows]
