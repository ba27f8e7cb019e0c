"""Evidence against losslessness: e-processes, G-tests, and the smallest shift that they could have found.

Shapes: V vocabulary, R contexts, m entries, cells as in `cell_probs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from specdec.eval.lossless.certificate import (
    POWER,
    Detectable,
)

CONCENTRATIONS = (16.0, 256.0, 4096.0, 65536.0)
CELL_RANKS = (1, 4, 16, 64)
NUM_CELLS = len(CELL_RANKS) + 1
MIN_EXPECTED = 5.0  # the least expectation of a G-test's cell
POWER_DRAWS, POWER_TOKENS = 1000, 1000


def token_terms(p: Tensor, n: Tensor) -> Tensor:
    """Returns the shares of log E_c, [m, concentrations], of tokens with probabilities p [m] and counts n [m]; inf
    where p = 0."""
    a = torch.tensor(CONCENTRATIONS, dtype=torch.float64)
    p, n = p.double()[:, None], n.double()[:, None]
    terms = torch.lgamma(a * p + n) - torch.lgamma(a * p) - n * p.log()
    return terms.masked_fill(p == 0, math.inf)


def context_terms(n: Tensor) -> Tensor:
    """Returns the other share of log E_c, [m, concentrations], of contexts with visits n [m]."""
    a = torch.tensor(CONCENTRATIONS, dtype=torch.float64)
    return torch.lgamma(a) - torch.lgamma(a + n.double()[:, None])


def log_mixture(log_e: Tensor) -> Tensor:
    """Returns the logarithm of the mean of e-values, over the last dimension of their logarithms."""
    return log_e.logsumexp(-1) - math.log(log_e.shape[-1])


def log_e_of_context(p: Tensor, counts: Tensor) -> Tensor:
    """Returns log E_c, [...], of a context with distribution p [V] for each of counts [..., V]; the mean over
    concentrations."""
    rows = counts.reshape(-1, counts.shape[-1])
    row, token = rows.nonzero(as_tuple=True)
    log_e = context_terms(rows.sum(-1)).index_add(0, row, token_terms(p[token], rows[row, token]))
    return log_mixture(log_e).view(counts.shape[:-1])


def _bets() -> tuple[Tensor, Tensor]:
    """Returns theta * a(cell), [bets, cells], and its exponential: bets for and against each cell, and for high ranks
    against low ones."""
    directions = [*torch.eye(NUM_CELLS, dtype=torch.float64), torch.linspace(0, 1, NUM_CELLS, dtype=torch.float64)]
    sizes = [sign * theta for theta in (0.01, 0.03, 0.1, 0.3, 1.0) for sign in (1, -1)]
    tilts = torch.stack([theta * direction for direction in directions for theta in sizes])
    return tilts, tilts.exp()


TILTS, TILT_FACTORS = _bets()


def cell_probs(p: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the probabilities of the cells, [R, cells], of distributions p [R, V], and for all cells but the last the
    least probability that is in it or in one before it, [R, cells - 1]. Tokens that tie with that are in it too."""
    largest = p.topk(min(CELL_RANKS[-1] + 1, p.shape[1])).values
    ends = [min(rank, p.shape[1]) - 1 for rank in CELL_RANKS]
    limits, after = largest[:, ends], torch.nn.functional.pad(largest, (0, 1))[:, [end + 1 for end in ends]]
    up_to = largest.cumsum(1)[:, ends]
    for row in ((limits == after) & (limits > 0)).any(1).nonzero()[:, 0].tolist():
        up_to[row] = torch.stack([p[row][p[row] >= limit].sum() for limit in limits[row]])
    up_to = torch.cat([up_to, torch.ones(len(p), 1, dtype=p.dtype)], 1)
    return up_to.diff(dim=1, prepend=torch.zeros(len(p), 1, dtype=p.dtype)).clamp(min=0), limits


@dataclass
class PooledProcess:
    """What the pooled e-process has seen."""

    positions: int = 0
    """Tokens so far."""
    cells: Tensor = field(default_factory=lambda: torch.zeros(NUM_CELLS, dtype=torch.float64))
    """[cells]: how often each cell came."""
    log_norms: Tensor = field(default_factory=lambda: torch.zeros(len(TILTS), dtype=torch.float64))
    """[bets]: sum of the logarithms of what each stake was divided by."""
    expected: Tensor = field(default_factory=lambda: torch.zeros(NUM_CELLS, dtype=torch.float64))
    """[cells]: expectation of `cells` under the distributions."""
    covariance: Tensor = field(default_factory=lambda: torch.zeros(NUM_CELLS, NUM_CELLS, dtype=torch.float64))
    """[cells, cells]: covariance of `cells` under the distributions."""
    from_top: Tensor = field(default_factory=lambda: torch.zeros(NUM_CELLS, dtype=torch.float64))
    """[cells]: what changes in `expected` when all of the first cell's mass moves to the others."""

    def add_laws(self, probs: Tensor, visits: Tensor) -> None:
        """Adds distributions. probs: [R, cells], their cells' probabilities. visits: [R], tokens emitted under each."""
        weighted = probs * visits[:, None]
        self.positions += int(visits.sum())
        self.log_norms += visits @ (probs @ TILT_FACTORS.T).log()
        self.expected += weighted.sum(0)
        self.covariance += weighted.sum(0).diag() - weighted.T @ probs
        others = probs.clone()
        others[:, 0] = 0
        moved = others / others.sum(1, keepdim=True).clamp(min=1e-300) * weighted[:, :1]
        moved[:, 0] = -moved.sum(1)
        self.from_top += moved.sum(0)

    def add_cells(self, cells: Tensor, counts: Tensor) -> None:
        """Adds tokens. cells: [m]. counts: [m], how many tokens there are in each."""
        self.cells += torch.bincount(cells, counts.double(), minlength=NUM_CELLS)

    @property
    def to_top(self) -> Tensor:
        """What changes in `expected` when all of the other cells' mass moves to the first, [cells]."""
        moved = -self.expected
        moved[0] = self.expected[1:].sum()
        return moved

    def log_e(self, cells: Tensor | None = None) -> Tensor:
        """Returns the logarithm of the e-process, [...]. cells: counts [..., cells]; None: those that were seen."""
        cells = self.cells if cells is None else cells
        return log_mixture(cells @ TILTS.T - self.log_norms)

    def plus(self, other: PooledProcess) -> PooledProcess:
        """Returns the process that has seen what either has."""
        return PooledProcess(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def g_test(p: Tensor, counts: Tensor) -> tuple[Tensor, int]:
    """Returns p-values [...] of G-tests with Williams' correction, and the number of cells after merging (1: there is
    nothing to test).

    p: [V], the distribution.
    counts: [..., V], each summing to the same n.
    """
    n = counts.sum(-1).flatten()[0].double()
    expected = n * p
    large = expected >= MIN_EXPECTED
    cells, observed = expected[large], counts[..., large].double()
    rest, seen = expected[~large].sum(), counts[..., ~large].double().sum(-1)
    if rest >= MIN_EXPECTED or len(cells) == 0:
        cells, observed = torch.cat([cells, rest[None]]), torch.cat([observed, seen[..., None]], -1)
    elif rest > 0:
        smallest = int(cells.argmin())
        cells[smallest] += rest
        observed[..., smallest] += seen
    if len(cells) < 2:
        return torch.ones(counts.shape[:-1], dtype=torch.float64), 1
    g = 2 * torch.xlogy(observed, observed / cells).sum(-1)
    freedom = len(cells) - 1
    g = g / (1 + ((n / cells).sum() - 1) / (6 * n * freedom))
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    return torch.special.gammaincc(half.expand_as(g), g.clamp(min=0) / 2), len(cells)


def smallest_shift(detected: Callable[[float], float], most: float) -> float | None:
    """Returns the smallest shift in (0, most] that `detected` finds with probability `POWER`, by bisection to 1 %; None
    where it finds none. detected: returns the probability that a shift is found."""
    if most <= 0 or detected(most) < POWER:
        return None
    low, high = 0.0, most
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if detected(middle) >= POWER else (middle, high)
    return high


def shifted(p: Tensor, shift: float, *, to_top: bool) -> Tensor:
    """Returns p [V] with `shift` of its mass moved from the most probable token to the others in proportion, or,
    to_top, from them to it."""
    top = int(p.argmax())
    others = p.clone()
    others[top] = 0
    others = others / others.sum().clamp(min=1e-300)
    moved = shift * (torch.nn.functional.one_hot(torch.tensor(top), len(p)) - others)
    return (p + (moved if to_top else -moved)).clamp(min=0)


def context_detectable(p: Tensor, visits: int, log_e_limit: float, p_limit: float, seed: int = 0) -> Detectable:
    """Returns the shifts that would be found at one context, by its e-process or its G-test. Beyond the `POWER_TOKENS`
    most probable ones, tokens count as one.

    p: [V], the context's distribution.
    visits: how often it is visited.
    log_e_limit: the e-process fails from this log E on.
    p_limit: the G-test fails up to this p-value.
    seed: of the simulation.
    """
    generator = np.random.default_rng(seed)
    p = p[p > 0].sort(descending=True).values

    def few(law: Tensor) -> Tensor:
        return law if len(p) <= POWER_TOKENS else torch.cat([law[:POWER_TOKENS], law[POWER_TOKENS:].sum()[None]])

    def power(shift: float, to_top: bool) -> float:
        law = few(shifted(p, shift, to_top=to_top)).numpy()
        counts = torch.from_numpy(generator.multinomial(visits, law / law.sum(), POWER_DRAWS))
        found = (log_e_of_context(few(p), counts) >= log_e_limit) | (g_test(few(p), counts)[0] <= p_limit)
        return float(found.double().mean())

    if visits == 0 or len(p) < 2:
        return Detectable(None, None)
    top = float(p.max())
    return Detectable(
        smallest_shift(lambda shift: power(shift, False), top),
        smallest_shift(lambda shift: power(shift, True), 1 - top),
    )


def pooled_detectable(process: PooledProcess, log_e_limit: float, seed: int = 0) -> Detectable:
    """Returns the shifts that the pooled e-process would find, whose counts are nearly normal; the same share of every
    position's mass moves."""
    if process.positions == 0:
        return Detectable(None, None)
    generator = torch.Generator().manual_seed(seed)
    values, vectors = torch.linalg.eigh(process.covariance)
    noise = torch.randn(POWER_DRAWS, NUM_CELLS, dtype=torch.float64, generator=generator)
    noise = noise @ (vectors * values.clamp(min=0).sqrt()).T

    def smallest(moved: Tensor) -> float | None:
        """Returns the smallest shift. moved: [cells], what changes in the expected counts when all mass moves."""
        total = float(moved.clamp(min=0).sum()) / process.positions

        def power(shift: float) -> float:
            counts = process.expected + shift / total * moved + noise
            return float((process.log_e(counts) >= log_e_limit).double().mean())

        return smallest_shift(power, total)

    return Detectable(smallest(process.from_top), smallest(process.to_top))
