"""Each operation of `TritonSampling` against the reference."""

from __future__ import annotations

import random
from array import array

import pytest
import torch
import triton
from torch import Tensor

from specdec.kernels import select
from specdec.kernels.decisions import GREEDY, Residuals, RowSampling
from specdec.kernels.triton import TritonSampling, slots, truncate
from support.fakes import randn
from support.sampled_rows import (
    EXACT,
    GLM_VOCAB,
    INF,
    NAN,
    UNIFORMS,
    check_laws_that_are_not_finite,
    check_residual_samples,
    check_rows_that_are_not_sound,
    check_truncated,
    distributions,
    flat,
    in_doubt,
    random_edits,
    residuals,
    sampling,
    select_laws,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, for what no lane goes on to use
]

REFERENCE = select(torch.device("cpu"), torch.float32, "reference")
# top_k, top_p, min_p
CUTS = [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (50, 0.95007, 0.05), (0, 0.90013, 0.0), (0, 1e-9, 0.0), (0, 0.99993, 1e-3),
    (100, 1.0, 0.3), (1 << 40, 0.30017, 1e-6), (7, 0.99993, 0.0), (3000, 0.9003, 1.0),
]  # fmt: skip


def cut_rows(size: int, cuts: list[tuple[int, float, float]], every: int = 1) -> tuple[Tensor, RowSampling]:
    """Every distribution with each of the cuts."""
    rows = [(x, cut) for x in distributions(size).values() for cut in cuts][::every]
    top_k, top_p, min_p = (list(values) for values in zip(*(cut for _, cut in rows)))
    scales = [[1.0, 0.5, 3.0, 1.25][r % 4] for r in range(len(rows))]
    law = sampling(len(rows), scales=scales, top_k=top_k, top_p=top_p, min_p=min_p)
    return torch.stack([x for x, _ in rows]), law


def assert_truncated(kernels: TritonSampling, logits: Tensor, law: RowSampling) -> Tensor:
    ours, expected = logits.to(kernels.device, copy=True), logits.double()
    kernels.truncate_(ours, law)
    EXACT.truncate_(expected, law)
    ours = ours.cpu()
    doubtful = torch.stack([in_doubt(row, law.select([r])) for r, row in enumerate(logits)])
    check_truncated(ours, logits, expected, doubtful)
    return ours


@pytest.mark.slow
@pytest.mark.parametrize(("size", "every"), [(1, 17), (6, 7), (173, 3), (2500, 17)])
def test_truncate_keeps_what_the_reference_keeps(kernels: TritonSampling, size: int, every: int) -> None:
    logits, law = cut_rows(size, CUTS, every)
    ours = assert_truncated(kernels, logits, law)
    for rows in ([2], [7, 2, 5]):
        few = logits[rows].to(kernels.device)
        kernels.truncate_(few, law.select(rows))
        assert torch.equal(few.cpu(), ours[rows]), "a row depends on its neighbours"


@pytest.mark.slow
def test_truncate_at_the_vocabulary_of_glm(kernels: TritonSampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """In few tiles, which spares the interpreter time and changes nothing."""
    if triton.knobs.runtime.interpret:
        monkeypatch.setattr(slots, "TILE", 65536)
        monkeypatch.setattr(truncate, "TILE", 65536)
    logits, law = cut_rows(GLM_VOCAB, [(50, 0.95007, 0.05), (0, 0.99003, 0.0)])
    rows = [1, 3, 5, 6]  # usual, flat and very flat by top-p; very peaked by all
    assert_truncated(kernels, logits[rows], law.select(rows))


@pytest.mark.slow
def test_truncate_keeps_ties_of_top_k_and_the_lowest_ids_of_top_p(kernels: TritonSampling) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]).repeat(3, 1).to(kernels.device)
    kernels.truncate_(logits, sampling(3, top_k=[2, 0, 2], top_p=[1.0, 0.7, 0.9]))
    kept = [[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 4]]  # 0.44 + 0.16 + ... of all six, 0.48 + 0.18 + ... of four
    assert [(row > -INF).nonzero()[:, 0].tolist() for row in logits] == kept
    equal = torch.zeros(1, 3000, device=kernels.device)
    kernels.truncate_(equal, sampling(1, top_p=0.7498))
    assert (equal[0] > -INF).nonzero()[:, 0].tolist() == list(range(2250))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 1500])
def test_rows_that_are_not_sound_become_nan(kernels: TritonSampling, size: int) -> None:
    check_rows_that_are_not_sound(kernels, size)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "num"), [(1, 1), (6, 13), (173, 26), (2500, 12)])
def test_choose_is_the_reference_choice(kernels: TritonSampling, size: int, num: int) -> None:
    logits = torch.stack(list(distributions(size).values())).repeat(2, 1)[:num]
    streams = [[0, GREEDY, 1, 3][r % 4] for r in range(num)]
    scales = [[1.0, 0.2, 3.0, 1e4][r % 4] for r in range(num)]
    law = sampling(num, scales=scales, streams=streams, starts=[5 * r for r in range(num)])
    ids = kernels.choose(logits.to(kernels.device), law).cpu()
    assert torch.equal(ids, EXACT.choose(logits, law))
    for rows in ([0], list(range(num))[::-3]):
        assert torch.equal(kernels.choose(logits[rows].to(kernels.device), law.select(rows)).cpu(), ids[rows])


@pytest.mark.slow
def test_choose_at_the_vocabulary_of_glm(kernels: TritonSampling) -> None:
    logits, law = 3 * randn(2, GLM_VOCAB), sampling(2, scales=0.9, streams=[0, GREEDY])
    assert torch.equal(kernels.choose(logits.to(kernels.device), law).cpu(), EXACT.choose(logits, law))


def test_equal_scores_go_to_the_lowest_id(kernels: TritonSampling) -> None:
    """Within a tile and across tiles; scores around 1e18 leave nothing of the noise."""
    logits = torch.full((3, 3000), 1000.0)
    logits[0, :2990] = logits[1, :5] = -1e9
    logits[2] = torch.where(torch.arange(3000) % 2 == 0, -0.0, 0.0)
    logits = logits.to(kernels.device)
    assert kernels.choose(logits, sampling(3, scales=1e15, streams=[0, 0, GREEDY])).tolist() == [2990, 5, 0]


def test_head_argmax_refuses_any_logit_that_is_not_finite(
    kernels: TritonSampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = randn(5, 40)
    logits[0, 3] = logits[0, 30] = 9.0
    logits[1, 7], logits[2, 39], logits[3, 0] = NAN, -INF, INF
    monkeypatch.setattr(kernels, "linear", lambda x, head: x)
    expected = [3, -1, -1, -1, int(logits[4].argmax())]
    assert kernels.head_argmax(logits.to(kernels.device), None).tolist() == expected
    assert kernels.head_argmax(logits.to(kernels.device, torch.bfloat16), None).tolist()[:4] == expected[:4]


@pytest.mark.parametrize("size", [1, 15, 2500])
def test_softmax_is_right_and_row_invariant(kernels: TritonSampling, size: int) -> None:
    """To half a unit of fp32, since all of it is fp64; sums of V terms of 2^-24 at most."""
    logits, scales = 5 * randn(6, size), torch.linspace(0.3, 4, 6).tolist()
    logits[:, size // 2 + 1 :: 3] = -INF
    logits[0] *= 100
    ours = kernels.softmax(logits.to(kernels.device), scales).cpu()
    expected = (logits.double() * torch.tensor(scales, dtype=torch.float64)[:, None]).softmax(-1)
    torch.testing.assert_close(ours.double(), expected, rtol=2**-23, atol=1e-40)
    assert (ours[logits == -INF] == 0).all()
    for rows in ([3], [5, 3]):
        assert torch.equal(
            kernels.softmax(logits[rows].to(kernels.device), [scales[r] for r in rows]).cpu(), ours[rows]
        )


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 40])
def test_edits_are_the_reference_edits(kernels: TritonSampling, size: int) -> None:
    """Every operation on a logit is one of fp32, in the reference's order."""
    rng = random.Random(size)
    edits = [random_edits(size, seed) if seed % 5 else None for seed in range(40)]
    drafts = [[rng.randrange(min(size, 4)) for _ in range(rng.randint(0, 5))] for _ in edits]
    logits = 3 * randn(len(edits), size)
    logits[:, 1] = -INF
    expected, ours = logits.clone(), logits.to(kernels.device, copy=True)
    REFERENCE.edit_(expected, edits, drafts)
    kernels.edit_(ours, edits, drafts)
    assert torch.equal(ours.cpu(), expected)
    assert (expected != logits).any(1).sum() > 25


def test_edits_longer_than_a_block_of_lanes(kernels: TritonSampling) -> None:
    size = 3000
    edits = random_edits(size, 1)
    ids = random.Random(0).sample(range(size), 700)
    edits.bias_ids[:], edits.biases[:] = array("q", ids), array("d", [0.01 * i for i in range(700)])
    edits.end_ids[:], edits.ends_banned = array("q", ids[300:600]), 2
    edits.counted_ids[:], edits.counts[:] = array("q", ids[100:]), array("q", [i % 3 for i in range(600)])
    edits.word_tokens[:], edits.word_starts[:] = array("q", [*range(600), 5, 6]), array("q", [*range(601), 602])
    logits = randn(2, size)
    expected, ours = logits.clone(), logits.to(kernels.device, copy=True)
    drafts = [[], [ids[650], ids[50], ids[50], 5]]
    REFERENCE.edit_(expected, [edits] * 2, drafts)
    kernels.edit_(ours, [edits] * 2, drafts)
    assert torch.equal(ours.cpu(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 6, 1500])
def test_residual_laws_are_right_and_independent_of_each_other(kernels: TritonSampling, size: int) -> None:
    exact = flat(residuals(size))
    assert exact.q is not None
    laws = Residuals(
        exact.p.to(kernels.device), exact.p_rows, exact.scales, exact.q.to(kernels.device), exact.q_rows, exact.excluded
    )
    num = len(laws.scales)
    mass = kernels.residual_mass(laws)
    assert mass == pytest.approx(EXACT.residual_mass(exact), rel=1e-12, abs=0)
    assert size == 1 or {0.0} < set(mass), "a law without mass, and others"
    for i in range(2):
        uniforms = [UNIFORMS[(r + i) % len(UNIFORMS)] for r in range(num)]
        ids = kernels.sample_residual(laws, uniforms)
        check_residual_samples(exact, ids, uniforms)
    some = [40, 3, 17]
    assert kernels.sample_residual(select_laws(laws, some), [uniforms[r] for r in some]) == [ids[r] for r in some]
    assert kernels.residual_mass(select_laws(laws, some)) == [mass[r] for r in some]


def test_residual_samples_at_the_ends_are_tokens_of_the_law(kernels: TritonSampling) -> None:
    p = torch.zeros(1, 3500, device=kernels.device)
    p[0, 1200:2600] = 1 / 1400
    laws = Residuals(p, [0] * 3, [1.0] * 3, None, [-1] * 3, [-1, 1200, 2599])
    assert kernels.sample_residual(laws, [0.0] * 3) == [1200, 1201, 1200]
    assert kernels.sample_residual(laws, [1 - 2**-53] * 3) == [2599, 2599, 2598]
    equal = Residuals(
        torch.full((1, 4096), 2.0**-12, device=kernels.device), [0] * 3, [1.0] * 3, None, [-1] * 3, [-1] * 3
    )
    assert kernels.sample_residual(equal, [0.25, 5 * 2**-12, 0.25 - 2**-53]) == [1024, 5, 1023]


def test_residual_laws_lose_nothing_to_rounding(kernels: TritonSampling) -> None:
    p = torch.full((1, 600), 1 / 3, device=kernels.device)
    (mass,) = kernels.residual_mass(Residuals(p, [0], [1 + 2**-30], p.clone(), [0], [-1]))
    assert mass == pytest.approx(600 * float(p[0, 0]) * 2**-30, rel=1e-6)
    assert kernels.residual_mass(Residuals(p, [0], [1.0], p.clone(), [0], [-1])) == [0.0]


def test_residual_laws_that_are_not_finite_have_no_sample(kernels: TritonSampling) -> None:
    check_laws_that_are_not_finite(kernels, 1100)


def test_nothing_to_do(kernels: TritonSampling) -> None:
    none, empty = sampling(0), torch.zeros(0, 7, device=kernels.device)
    assert kernels.choose(empty, none).tolist() == []
    assert kernels.softmax(empty, []).shape == (0, 7)
    kernels.truncate_(empty, none)
    kernels.edit_(empty, [], [])
    laws = Residuals(empty, [], [], None, [], [])
    assert kernels.residual_mass(laws) == []
    assert kernels.sample_residual(laws, []) == []
