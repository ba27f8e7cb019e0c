"""How often 95 % intervals hold the truth, on simulated requests: what chose the method of `intervals`.

    python tests/interval_coverage.py [--runs 4000] [--requests 4,8,16,32,96]

Requests differ in how well they are drafted (acceptance ~ Beta), in length and in speed; acceptance falls with the
draft position and drifts within a request; how many verifications a request has depends on what was accepted. Runs draw
their requests from a population of `POPULATION`, whose own values are therefore the exact truth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from rich.console import Console
from rich.table import Table

from specdec.eval.acceptance.intervals import NUM_RESAMPLES, Estimate, calibration_error, paired_ratios, ratios
from specdec.eval.acceptance.pooling import sum_by
from specdec.eval.acceptance.records import Floats

POPULATION = 50_000
SCENARIOS = {"moderate": (5.0, 2.5), "very different": (1.5, 0.7), "high": (30.0, 1.5), "low": (1.0, 6.0)}
NUM_DRAFTS, SHORTEST, LONGEST = 3, 48, 256
DECAY = np.array([1.0, 1.15, 1.3])  # acceptance at each position is that at the first to this power
VERIFICATION_S = 1.25  # of one with drafts; a plain step takes 1
AT_ONCE = 200  # runs
Limits = tuple[Floats, Floats]
Method = Callable[["Statistic"], Limits]


@dataclass(frozen=True, eq=False)
class Statistic:
    """sum x / sum y, or (sum x / sum y) / (sum u / sum v): factors x, y (u, v), each [requests] or [requests, runs].
    most: of x, None without a limit."""

    factors: tuple[Floats, ...]
    most: Floats | None = None

    def value(self, weights: Floats | None = None) -> Floats:
        """weights [resamples, requests]: how often each request counts."""
        sums = [f.sum(0) if weights is None else weights @ f for f in self.factors]
        quotients = [x / y for x, y in zip(sums[::2], sums[1::2])]
        return quotients[0] if len(quotients) == 1 else quotients[0] / quotients[1]

    def of(self, chosen: np.ndarray) -> Statistic:
        return Statistic(tuple(f[chosen] for f in self.factors), None if self.most is None else self.most[chosen])


@dataclass(frozen=True)
class Coverage:
    """Shares of the runs whose interval holds the truth, lies above it, lies below it; median width."""

    covered: float
    above: float
    below: float
    width: float

    @classmethod
    def of(cls, truth: float, low: Floats, high: Floats) -> Coverage:
        """Of runs that have an interval."""
        known = ~np.isnan(low)
        low, high = low[known], high[known]
        above, below = float((low > truth).mean()), float((high < truth).mean())
        return cls(1 - above - below, above, below, float(np.median(high - low)))


@dataclass(frozen=True, eq=False)
class Requests:
    """n requests. drafted, reached, accepted [n, NUM_DRAFTS]; gaps [n, 10]: accepted - confidence, by confidence."""

    drafted: Floats
    reached: Floats
    accepted: Floats
    forwards: Floats
    tokens: Floats
    decode_s: Floats
    plain_s: Floats
    gaps: Floats

    @property
    def statistics(self) -> dict[str, Statistic]:
        accepted, drafted, one = self.accepted.sum(1), self.drafted.sum(1), np.ones(len(self.tokens))
        return {
            **{
                f"conditional acceptance {i + 1}": Statistic((a, r), r)
                for i, (a, r) in enumerate(zip(self.accepted.T, self.reached.T))
            },
            "unconditional acceptance 3": Statistic((self.accepted[:, 2], self.drafted[:, 2]), self.drafted[:, 2]),
            "mean acceptance length": Statistic((accepted, self.drafted[:, 0]), drafted),
            "draft efficiency": Statistic((accepted, drafted), drafted),
            "block efficiency": Statistic((self.tokens, self.forwards)),
            "tokens/s per request": Statistic((self.tokens / self.decode_s, one)),
            "speed-up": Statistic((self.plain_s, self.tokens, self.decode_s, self.tokens)),
        }


def simulate(num_requests: int, acceptance: tuple[float, float], seed: int = 0) -> Requests:
    """acceptance: parameters of its Beta distribution over requests."""
    generator, n, position = np.random.default_rng(seed), num_requests, np.arange(NUM_DRAFTS)
    likely, drift = generator.beta(*acceptance, n), np.zeros(n)
    tokens = generator.integers(SHORTEST, LONGEST + 1, n)
    left, forwards = tokens.copy(), np.zeros(n)
    drafted, reached, accepted, gaps = (np.zeros((n, columns)) for columns in (NUM_DRAFTS,) * 3 + (10,))
    while (running := np.flatnonzero(left > 0)).size:
        drift[running] = 0.9 * drift[running] + 0.15 * generator.standard_normal(running.size)
        alpha = likely[running, None] ** (DECAY * np.exp(drift[running, None]))  # [running, NUM_DRAFTS]
        is_drafted = position < left[running, None] - 1
        is_accepted = np.logical_and.accumulate(is_drafted & (generator.random(alpha.shape) < alpha), axis=1)
        is_reached = is_drafted & np.pad(is_accepted, ((0, 0), (1, 0)), constant_values=True)[:, :NUM_DRAFTS]
        confidence = np.sqrt(alpha) * generator.uniform(0.8, 1.0, alpha.shape)
        row = np.broadcast_to(np.arange(running.size)[:, None], alpha.shape)[is_reached]
        places = 10 * row + np.minimum((10 * confidence[is_reached]).astype(int), 9)
        gap = (is_accepted - confidence)[is_reached]
        gaps[running] += sum_by(places, gap[:, None], 10 * running.size).reshape(-1, 10)
        for total, part in ((drafted, is_drafted), (reached, is_reached), (accepted, is_accepted)):
            total[running] += part
        forwards[running] += 1
        left[running] -= is_accepted.sum(1) + 1
    slow = generator.lognormal(0, 0.25, n)  # both ways of decoding meet it
    decode_s, plain_s = slow * np.stack([VERIFICATION_S * forwards, tokens]) * generator.lognormal(0, 0.05, (2, n))
    return Requests(drafted, reached, accepted, forwards, tokens.astype(np.float64), decode_s, plain_s, gaps)


def studentised(statistic: Statistic) -> Limits:
    """Those of `intervals`."""
    x, y, *other = statistic.factors
    if not other:
        return _limits(ratios(x, y, statistic.most))
    u, v = other
    return _limits(paired_ratios(x, y, u, v))


@np.errstate(divide="ignore", invalid="ignore")
def percentile(statistic: Statistic) -> Limits:
    low, high = np.quantile(_resampled(statistic), (0.025, 0.975), axis=0)
    return low, high


@np.errstate(divide="ignore", invalid="ignore")
def bca(statistic: Statistic) -> Limits:
    """Bias-corrected and accelerated (Efron 1987), acceleration by the jackknife."""
    values, normal = np.sort(_resampled(statistic), axis=0), NormalDist()
    value, n = statistic.value(), len(statistic.factors[0])
    jackknife = statistic.value(1 - np.eye(n))
    d = jackknife.mean(0) - jackknife
    acceleration = (d**3).sum(0) / np.maximum(6 * (d**2).sum(0) ** 1.5, 1e-300)
    share = ((values < value).mean(0) + (values <= value).mean(0)) / 2
    bias = np.vectorize(normal.inv_cdf)(np.clip(share, 1 / NUM_RESAMPLES, 1 - 1 / NUM_RESAMPLES))
    limits = []
    for z in (normal.inv_cdf(0.025), normal.inv_cdf(0.975)):
        quantile = np.vectorize(normal.cdf)(bias + (bias + z) / (1 - acceleration * (bias + z)))
        places = np.clip(np.rint(np.nan_to_num(quantile) * (NUM_RESAMPLES + 1)).astype(int) - 1, 0, NUM_RESAMPLES - 1)
        limits.append(values[places, np.arange(values.shape[1])])
    return limits[0], limits[1]


METHODS: dict[str, Method] = {"studentised": studentised, "BCa": bca, "percentile": percentile}


def _resampled(statistic: Statistic) -> Floats:
    n = len(statistic.factors[0])
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), NUM_RESAMPLES)
    return np.nan_to_num(statistic.value(weights.astype(np.float64)))


def _limits(estimates: list[Estimate]) -> Limits:
    low, high = np.array([(e.low, e.high) for e in estimates], np.float64).T
    return low, high


def coverage(population: Statistic, num_requests: int, runs: int, method: Method = studentised) -> Coverage:
    """Of `runs` runs of so many requests, drawn from the population."""
    chosen = np.random.default_rng(1).integers(len(population.factors[0]), size=(num_requests, runs))
    blocks = [method(population.of(chosen[:, i : i + AT_ONCE])) for i in range(0, runs, AT_ONCE)]
    low, high = (np.concatenate(limits) for limits in zip(*blocks))
    return Coverage.of(float(population.value()), low, high)


def calibration_coverage(population: Requests, num_requests: int, runs: int) -> Coverage:
    """The same for the calibration error."""
    gaps, counts = population.gaps, population.reached.sum(1)
    chosen = np.random.default_rng(1).integers(len(counts), size=(runs, num_requests))
    truth = float(np.abs(gaps.sum(0)).sum() / counts.sum())
    return Coverage.of(truth, *_limits([calibration_error(gaps[i], counts[i]) for i in chosen]))


def tables(sizes: list[int], runs: int, out: Console) -> None:
    for scenario, acceptance in SCENARIOS.items():
        population = simulate(POPULATION, acceptance)
        for n in sizes:
            title = f"{scenario} acceptance, {n} requests: coverage (interval too high, too low), median width"
            table = Table("", *METHODS, title=title, title_justify="left")
            for name, statistic in population.statistics.items():
                found = (coverage(statistic, n, runs, method) for method in METHODS.values())
                table.add_row(name, *map(_text, found))
            table.add_row("calibration error", _text(calibration_coverage(population, n, runs)))
            out.print(table)


def _text(c: Coverage) -> str:
    return f"{c.covered:.1%} ({c.above:.1%}, {c.below:.1%}) {c.width:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4000)
    parser.add_argument("--requests", default="4,8,16,32,96")
    args = parser.parse_args()
    tables([int(n) for n in args.requests.split(",")], args.runs, Console(width=150))


if __name__ == "__main__":
    main()
