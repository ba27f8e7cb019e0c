"""Rows of logits with every sort of parameter, residual laws and random numbers, for the tests of kernels."""

from __future__ import annotations

import random
from array import array
from dataclasses import fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import AnyBackend, select
from specdec.kernels.decisions import GREEDY, LogitEdits, Residuals, RowSampling
from specdec.kernels.reference import residual_law
from support.fakes import randn

EXACT = select(torch.device("cpu"), torch.float64, "reference")
INF, NAN = float("inf"), float("nan")
GLM_VOCAB = 151_552
UNIFORMS = [0.0, 1 - 2**-53, 0.5, 2**-53, 0.123456789, 0.987654321]

# Random123's kat_vectors for philox4x32-10: counter, key, result.
PHILOX_VECTORS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def mixed_rows(num: int, streams: list[int]) -> RowSampling:
    """Temperatures, cuts and streams in turns; the keys of the noise differ."""
    return RowSampling(
        scales=[[1.0, 2.5, 0.7][b % 3] for b in range(num)],
        top_k=[[0, 20, 3][b % 3] for b in range(num)],
        top_p=[[0.9, 1.0, 0.8, 0.97][b % 4] for b in range(num)],
        min_p=[[0.0, 0.05][b % 2] for b in range(num)],
        seeds=[2**64 - 1 - 977 * b for b in range(num)],
        streams=[streams[b % len(streams)] for b in range(num)],
        positions=[31 * b + 8 for b in range(num)],
        starts=[31 * b + 6 if streams[b % len(streams)] > 0 else 0 for b in range(num)],
    )


def random_edits(vocab_size: int, seed: int) -> LogitEdits:
    """Some of everything, or all of it; tokens are few, so that bad words come about and tokens repeat."""
    rng = random.Random(seed)

    def ids(most: int, among: int = vocab_size) -> list[int]:
        return rng.sample(range(among), rng.randint(0, min(most, among)))

    biased, counted = ids(5), ids(20)
    words = [[rng.randrange(3) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(0, 6))]
    return LogitEdits(
        bias_ids=array("q", biased),
        biases=array("d", [rng.choice([-3.5, 2.25, float("-inf")]) for _ in biased]),
        end_ids=array("q", ids(2)),
        ends_banned=rng.randint(0, 3),
        word_starts=array("q", accumulate(map(len, words), initial=0)),
        word_tokens=array("q", [token for word in words for token in word]),
        recent=array("q", [rng.randrange(3) for _ in range(rng.randint(0, 2))]),
        counted_ids=array("q", counted),
        counts=array("q", [rng.randrange(4) for _ in counted]),
        repetition=rng.choice([1.0, 1.3, 0.7]),
        presence=rng.choice([0.0, 0.4]),
        frequency=rng.choice([0.0, 0.3, -0.2]),
    )


def sampling(num: int, **values: Any) -> RowSampling:
    """Single values for all rows, lists with one each; the keys of the noise differ."""
    defaults = {
        "scales": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "streams": 0, "starts": 0,
        "seeds": [(0x9E3779B97F4A7C15 * (r + 1)) % 2**64 for r in range(num)],
        "positions": [(7919 * r) % 2**31 for r in range(num)],
    }  # fmt: skip
    given = defaults | values
    return RowSampling(
        **{f.name: v if isinstance(v := given[f.name], list) else [v] * num for f in fields(RowSampling)}
    )


def distributions(size: int) -> dict[str, Tensor]:
    x, middle = randn(size, seed=size), size // 2
    return {
        "usual": 4 * x,
        "flat": x,
        "very flat": 1e-3 * x,
        "very peaked": 40 * x,
        "all equal": torch.full((size,), 0.3),
        "zeros of both signs": torch.where(x > 0, 0.0, -0.0),
        "few values": (2 * x).round(),
        "one value and one above": torch.zeros(size).index_fill(0, torch.tensor([middle]), 3.0),
        "banned": (3 * x).masked_fill(x > 0.3, -INF).index_fill(0, torch.tensor([middle]), 1.0),
        "one finite": torch.full((size,), -INF).index_fill(0, torch.tensor([middle]), -2.0),
        "beyond exp": torch.where(x > 0.3, 5 * x, -1e30 * (2 + x)),
        "a narrow band far out": (1000 + 1e-3 * x),
        "falling": torch.linspace(0, -90, size),
    }


def in_doubt(row: Tensor, law: RowSampling) -> Tensor:
    """Tokens for which rounding of 1e-6 decides whether they stay."""
    row = row[None].double()
    EXACT.truncate_(row, sampling(1, top_k=law.top_k))
    probs, ids = (row[0] * law.scales[0]).softmax(-1).sort(descending=True, stable=True)
    near = (probs.cumsum(-1) - probs - law.top_p[0]).abs() < 1e-6
    near |= (probs / probs[0] - law.min_p[0]).abs() < 1e-6
    near[0] = False
    return torch.zeros_like(near).scatter(0, ids, near)


def check_truncated(ours: Tensor, logits: Tensor, expected: Tensor, doubtful: Tensor) -> None:
    """Rows after truncation against the exact ones, which may keep other tokens where `doubtful`."""
    kept = ours > -INF
    differs = kept != (expected > -INF)
    assert not (differs & ~doubtful).any()
    assert differs.any(1).sum() <= len(logits) / 50, "near-ties are rare"
    assert torch.equal(ours[kept], logits[kept])
    assert kept.any(1).all()
    assert not ours.isnan().any()


def check_rows_that_are_not_sound(kernels: AnyBackend, size: int) -> None:
    """They become NaN, and choose nothing."""
    logits = randn(9, size)
    for r, (bad, at) in enumerate([(NAN, 0), (NAN, size - 1), (INF, size // 2), (INF, size - 1)]):
        logits[r, at] = bad
    logits[4] = -INF
    logits[5, 1:] = -INF
    logits = logits.to(kernels.device)
    for law in (sampling(9), sampling(9, top_k=3, top_p=0.9, min_p=0.1), sampling(9, streams=GREEDY)):
        ours = logits.clone()
        kernels.truncate_(ours, law)
        assert ours[:5].isnan().all()
        assert not ours[5:].isnan().any()
        for rows in (logits, ours):
            ids = kernels.choose(rows, law)
            assert (ids == -1).tolist() == [True] * 5 + [False] * 4
            assert ids[5] == 0


def residuals(size: int) -> Residuals:
    """Laws with and without q, of one-hot rows, without mass, with excluded tokens; rows used more than once."""
    p, q = ((3 * randn(2, 2, size, seed=i)).softmax(-1) for i in (1, 2))
    p[0, 0] = torch.nn.functional.one_hot(torch.tensor(size // 2), size)
    q[0, 1] = p[1, 0]
    p[1, 1, 1::2] = 0
    laws = [  # row of p, scale, row of q, excluded token
        *((row, scale, -1, out) for row in range(4) for scale in (1.0, 0.3) for out in (-1, 0, size - 1, size // 2)),
        *((row, scale, other, -1) for row in range(4) for scale in (1.0, 0.7) for other in range(4)),
        *((row, 2.0, 2, size // 2) for row in range(4)),
    ]
    p_rows, scales, q_rows, excluded = (list(values) for values in zip(*laws))
    return Residuals(p, p_rows, scales, q, q_rows, excluded)


def flat(laws: Residuals) -> Residuals:
    assert laws.q is not None
    return Residuals(laws.p.flatten(0, 1), laws.p_rows, laws.scales, laws.q.flatten(0, 1), laws.q_rows, laws.excluded)


def select_laws(laws: Residuals, rows: list[int]) -> Residuals:
    p_rows, scales, q_rows, excluded = (
        [values[r] for r in rows] for values in (laws.p_rows, laws.scales, laws.q_rows, laws.excluded)
    )
    return Residuals(laws.p, p_rows, scales, laws.q, q_rows, excluded)


def check_residual_samples(exact: Residuals, ids: list[int], uniforms: list[float]) -> None:
    """Each is where the law's sums pass its uniform number."""
    for r, (token, uniform) in enumerate(zip(ids, uniforms)):
        law = residual_law(exact, r)
        target, slack = uniform * law.sum(), 1e-12 * law.sum()
        assert law[token] > 0, "a token of the law"
        assert law[:token].sum() <= target + slack
        assert law[: token + 1].sum() >= target - slack


def check_laws_that_are_not_finite(kernels: AnyBackend, size: int) -> None:
    """They have neither a sample nor a mass."""
    p, q = randn(4, size).softmax(-1), randn(1, size, seed=1).softmax(-1)
    p[0, 7], p[1, size - 1], p[2] = NAN, INF, NAN
    laws = Residuals(
        p.to(kernels.device), [0, 0, 1, 2, 3, 3, 0], [1.0] * 7, q.to(kernels.device), [-1, 0, 0, -1, -1, 0, 0],
        [-1] * 6 + [7],
    )  # fmt: skip
    finite = [False, False, False, False, True, True, True]
    assert [token >= 0 for token in kernels.sample_residual(laws, [0.5] * 7)] == finite
    assert [abs(mass) < INF for mass in kernels.residual_mass(laws)] == finite
