"""The C++ kernels from logits to tokens: right against the reference, whatever shortcuts they take."""

from __future__ import annotations

import ctypes
import platform
import random
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.kernels import philox
from specdec.kernels.cpu import CpuKernels, build
from specdec.kernels.decisions import GREEDY, Residuals, RowSampling
from specdec.kernels.reference import lowest_argmax
from support.fakes import WHY_NO_COMPILER, randn
from support.sampled_rows import (
    EXACT,
    GLM_VOCAB,
    INF,
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

if WHY_NO_COMPILER:
    pytest.skip(WHY_NO_COMPILER, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_empty", "num_threads")

MAX_ROWS = 17
ARCHITECTURES = ["native", *(["haswell", "x86-64"] if platform.machine() == "x86_64" else [])]  # as in test_cpu


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels(torch.float32, architecture=request.param)


CUTS = [  # top_k, top_p, min_p; equal tokens are never a whole number of them
    (0, 1.0, 0.0), (1, 1.0, 0.0), (50, 1.0, 0.0), (3000, 1.0, 0.0), (0, 0.90013, 0.0), (0, 1e-9, 0.0),
    (0, 0.99993, 0.0), (0, 1.0, 0.05), (0, 1.0, 1.0), (50, 0.95007, 0.05), (5, 0.50003, 0.0), (3000, 0.90013, 0.0),
    (100, 1.0, 0.3), (0, 0.80011, 0.2), (7, 0.99993, 1e-3), (1 << 40, 0.30017, 1e-6),
]  # fmt: skip
FEW_CUTS = [(50, 0.950007, 0.05), (0, 0.950007, 0.0), (100_000, 0.990003, 1e-7), (2000, 1.0, 0.0)]


@cache
def truncated(size: int) -> tuple[Tensor, RowSampling, Tensor, Tensor]:
    """Rows of every distribution with every cut, their sampling, the reference's answer and where it is in doubt."""
    cuts = FEW_CUTS if size == GLM_VOCAB else [*CUTS, (size, 1.0, 0.0), (size - 1, 0.90013, 0.0)]
    rows = [(x, cut) for x in distributions(size).values() for cut in cuts]
    logits = torch.stack([x for x, _ in rows])
    top_k, top_p, min_p = (list(values) for values in zip(*(cut for _, cut in rows)))
    scales = [[1.0, 0.5, 3.0, 1.25][r % 4] for r in range(len(rows))]
    law = sampling(len(rows), scales=scales, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = logits.double()
    EXACT.truncate_(expected, law)
    return logits, law, expected, torch.stack([in_doubt(logits[r], law.select([r])) for r in range(len(rows))])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 6, 64, 173, 5000, GLM_VOCAB])
def test_truncate_keeps_what_the_reference_keeps(kernels: CpuKernels, size: int) -> None:
    logits, law, expected, doubtful = truncated(size)
    ours = logits.clone()
    kernels.truncate_(ours, law)
    check_truncated(ours, logits, expected, doubtful)
    if size <= 5000:
        for num in range(1, MAX_ROWS + 1):
            few = logits[num : 2 * num].clone()
            kernels.truncate_(few, law.select(list(range(num, num + len(few)))))
            assert torch.equal(few, ours[num : 2 * num]), num


def test_truncate_keeps_ties_of_top_k_and_the_lowest_ids_of_top_p(kernels: CpuKernels) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]).repeat(3, 1)
    kernels.truncate_(logits, sampling(3, top_k=[2, 0, 2], top_p=[1.0, 0.7, 0.9]))
    kept = [[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 4]]  # 0.44 + 0.16 + ... of all six, 0.48 + 0.18 + ... of four
    assert [(row > -INF).nonzero()[:, 0].tolist() for row in logits] == kept
    equal = torch.zeros(1, 1000)
    kernels.truncate_(equal, sampling(1, top_p=0.2495))
    assert (equal[0] > -INF).nonzero()[:, 0].tolist() == list(range(250))


@pytest.mark.parametrize("size", [4, 40, 5000])
def test_edits_are_the_reference_edits(kernels: CpuKernels, size: int) -> None:
    rng = random.Random(size)
    edits = [random_edits(size, seed) if seed % 5 else None for seed in range(200)]
    drafts = [[rng.randrange(min(size, 4)) for _ in range(rng.randint(0, 8))] for _ in edits]
    logits = 3 * randn(len(edits), size)
    logits[:, 1] = -INF
    expected, ours = logits.double(), logits.clone()
    EXACT.edit_(expected, edits, drafts)
    kernels.edit_(ours, edits, drafts)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[::5], logits[::5])
    changed = (ours != logits).any(1)
    assert changed.sum() > 100
    untouched = logits.clone()
    kernels.edit_(untouched, [None] * len(edits), drafts)
    assert torch.equal(untouched, logits)


@pytest.mark.parametrize("size", [1, 40, 173])
def test_rows_that_are_not_sound_become_nan(kernels: CpuKernels, size: int) -> None:
    check_rows_that_are_not_sound(kernels, size)


STRAIGHT = """
#include "sampling.h"
extern "C" void straight(const float* logits, float scale, int64_t size, uint64_t seed, uint32_t position,
                         uint32_t start, uint32_t stream, float* scores) {
  for (int64_t first = 0; first < size; first += specdec::BLOCK) {
    float noise[specdec::BLOCK];
    gumbel(specdec::sixteen_calls(first, {seed, position, start, stream}), noise);
    for (int64_t i = first; i < std::min(size, first + specdec::BLOCK); ++i)
      scores[i] = std::fma(logits[i], scale, noise[i - first]);
  }
}
"""


Straight = Callable[[Tensor, RowSampling], Tensor]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """The scores of all tokens, without a shortcut."""
    folder: Path = tmp_path_factory.mktemp("straight")
    (folder / "straight.cpp").write_text(STRAIGHT)
    command = [build._find_compiler(), *build.FLAGS, "-march=native", f"-I{build.SOURCES}"]
    subprocess.run([*command, str(folder / "straight.cpp"), "-o", str(folder / "straight.so")], check=True)
    library = ctypes.CDLL(str(folder / "straight.so"))

    def scores(logits: Tensor, law: RowSampling) -> Tensor:
        result = torch.zeros_like(logits)
        for r, row in enumerate(logits):
            library.straight(
                ctypes.c_void_p(row.data_ptr()), ctypes.c_float(law.scales[r]), ctypes.c_int64(len(row)),
                ctypes.c_uint64(law.seeds[r]), law.positions[r], law.starts[r], law.streams[r],
                ctypes.c_void_p(result[r].data_ptr()),
            )  # fmt: skip
        return result

    return scores


@cache
def noisy(straight: Straight, size: int) -> tuple[Tensor, RowSampling, Tensor]:
    """Rows, their sampling, all scores."""
    logits = torch.stack(list(distributions(size).values())).repeat(3, 1)
    num = len(logits)
    scales = [[1.0, 0.2, 3.0, 1e4][r % 4] for r in range(num)]
    law = sampling(num, scales=scales, streams=[r % 4 for r in range(num)], starts=[r * r for r in range(num)])
    return logits, law, straight(logits, law)


@pytest.mark.parametrize("size", [1, 6, 64, 173, 5000, GLM_VOCAB])
def test_choose_skips_no_token_that_could_win(kernels: CpuKernels, straight: Straight, size: int) -> None:
    logits, law, scores = noisy(straight, size)
    ids = kernels.choose(logits, law)
    assert torch.equal(ids, lowest_argmax(scores))
    for num in range(1, MAX_ROWS + 1):
        some = list(range(num, 2 * num))
        assert torch.equal(kernels.choose(logits[some], law.select(some)), ids[some]), num


def test_equal_scores_go_to_the_lowest_id(kernels: CpuKernels, straight: Straight) -> None:
    """Scores around 1e7 leave no bit of the noise below 1, so that many are equal; the largest logit comes last."""
    logits = torch.full((300, 500), 1000.0)
    logits[:, 499] = torch.nextafter(logits[0, 0], torch.tensor(INF))
    law = sampling(300, scales=1e4)
    scores = straight(logits, law)
    assert ((scores == scores.amax(-1, keepdim=True)).sum(-1) > 1).sum() > 50
    assert torch.equal(kernels.choose(logits, law), lowest_argmax(scores))


@pytest.mark.parametrize("size", [1, 6, 64, 173, 5000])
def test_choose_is_the_reference_choice(kernels: CpuKernels, size: int) -> None:
    num = 200 if size < 1000 else 40
    logits = 2 * randn(num, size)
    logits[::3, size // 2 + 1 :] = -INF
    streams = [[GREEDY, 0, 1, 3][r % 4] for r in range(num)]
    law = sampling(
        num, scales=torch.linspace(0.2, 3, num).tolist(), streams=streams, starts=[5 * r for r in range(num)]
    )
    ids = kernels.choose(logits, law)
    scores = logits.double() * torch.tensor(law.scales, dtype=torch.float64)[:, None]
    scores += torch.from_numpy(philox.gumbel_noise(law.seeds, law.streams, law.positions, law.starts, size))
    greedy = torch.tensor(streams) == GREEDY
    scores[greedy] = logits[greedy].double()
    short = scores.amax(-1) - scores.gather(1, ids[:, None])[:, 0]
    assert short.max() <= 2e-5, "another token than the best, and not for a near-tie"
    assert torch.equal(ids[greedy], lowest_argmax(logits[greedy]))
    assert torch.equal(EXACT.choose(logits, law), lowest_argmax(scores))


def test_greedy_choices_take_the_lowest_id_among_equals(kernels: CpuKernels) -> None:
    logits = torch.zeros(3, 300)
    logits[0, 150:] = logits[1, 299] = 2.0
    logits[2] = -0.0
    logits[2, 200] = 0.0
    assert kernels.choose(logits, sampling(3, streams=GREEDY, scales=0.1)).tolist() == [150, 299, 0]


def test_choices_are_samples_of_the_softmax(kernels: CpuKernels) -> None:
    """Pearson's chi-square over 20,000 positions, at its 1e-4 quantile for 5 degrees of freedom."""
    logits, num = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0]), 20_000
    law = sampling(num, scales=0.7, seeds=12345, positions=list(range(num)))
    expected = (0.7 * logits.double()).softmax(0) * num
    counts = torch.bincount(kernels.choose(logits.expand(num, 6), law), minlength=6)
    assert ((counts - expected) ** 2 / expected).sum() < 25.7


def test_noise_at_both_ends_of_the_words(kernels: CpuKernels) -> None:
    """G = -log(-log u) to 1e-6 for the smallest and largest of a million numbers: what decides a choice among many."""
    noise = torch.from_numpy(philox.gumbel_noise([1], [0], [0], [0], 1_000_000))[0]
    top, low = int(noise.argmax()), int(noise.argmin())
    for token in (top, low):  # raise it by just so much that it wins, or does not
        for margin, wins in ((2e-5, True), (-2e-5, False)):
            logits = torch.zeros(1, 1_000_000)
            rest = noise.clone()
            rest[token] = -1e9
            logits[0, token] = float(rest.max() - noise[token]) + margin
            assert (int(kernels.choose(logits, sampling(1, seeds=1))) == token) == wins


@pytest.mark.parametrize("size", [1, 15, 173, 50_000])
def test_softmax_is_right_and_row_invariant(kernels: CpuKernels, size: int) -> None:
    logits, scales = 5 * randn(MAX_ROWS, size), torch.linspace(0.3, 4, MAX_ROWS).tolist()
    logits[:, size // 2 + 1 :: 3] = -INF
    whole = kernels.softmax(logits, scales)
    expected = (logits.double() * torch.tensor(scales, dtype=torch.float64)[:, None]).softmax(-1)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(whole.double().sum(-1), torch.ones(MAX_ROWS, dtype=torch.float64), rtol=0, atol=2e-7)
    assert (whole[logits == -INF] == 0).all()
    for rows in range(1, MAX_ROWS + 1):
        assert torch.equal(kernels.softmax(logits[:rows], scales[:rows]), whole[:rows]), rows


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 6, 173, 512, 5000, GLM_VOCAB])
def test_residual_laws_are_right_and_independent_of_each_other(kernels: CpuKernels, size: int) -> None:
    laws = residuals(size)
    num, exact = len(laws.scales), flat(laws)
    mass = kernels.residual_mass(laws)
    assert mass == pytest.approx(EXACT.residual_mass(exact), rel=1e-12, abs=0)
    assert size == 1 or {0.0} < set(mass), "a law without mass, and others"
    for i, u in enumerate(UNIFORMS):
        uniforms = [u if r % 2 else UNIFORMS[(r + i) % len(UNIFORMS)] for r in range(num)]
        ids = kernels.sample_residual(laws, uniforms)
        check_residual_samples(exact, ids, uniforms)
        for few in range(1, MAX_ROWS + 1 if size < GLM_VOCAB else 3):
            some = list(range(few, 2 * few))
            assert kernels.sample_residual(select_laws(laws, some), [uniforms[r] for r in some]) == [
                ids[r] for r in some
            ]
            assert kernels.residual_mass(select_laws(laws, some)) == [mass[r] for r in some]
        if size == GLM_VOCAB:
            break


def test_residual_samples_at_the_ends_are_tokens_of_the_law(kernels: CpuKernels) -> None:
    """Also where the first and last tokens, or whole blocks of them, are not; and without q at all."""
    p = torch.zeros(1, 3000)
    p[0, 700:2100] = 1 / 1400
    laws = Residuals(p, [0] * 3, [1.0] * 3, None, [-1] * 3, [-1, 700, 2099])
    assert kernels.sample_residual(laws, [0.0] * 3) == [700, 701, 700]
    assert kernels.sample_residual(laws, [1 - 2**-53] * 3) == [2099, 2099, 2098]
    ones = torch.ones(1, 3000)
    assert kernels.sample_residual(Residuals(ones, [0], [1.0], ones - p, [0], [-1]), [0.5]) == [1400]


def test_residual_laws_lose_nothing_to_rounding(kernels: CpuKernels) -> None:
    """A difference in the last place of scale * p is a law; equal to q in fp64 it is none."""
    p = torch.full((1, 600), 1 / 3)
    q = (p.double() * (1 - 2**-30)).float()
    assert torch.equal(p, q), "nothing of it is left in fp32"
    (mass,) = kernels.residual_mass(Residuals(p, [0], [1 + 2**-30], q, [0], [-1]))
    assert mass == pytest.approx(600 * float(p[0, 0]) * 2**-30, rel=1e-6)
    assert kernels.residual_mass(Residuals(p, [0], [1.0], q, [0], [-1])) == [0.0]


def test_residual_laws_that_are_not_finite_have_no_sample(kernels: CpuKernels) -> None:
    check_laws_that_are_not_finite(kernels, 1000)


@pytest.mark.parametrize("num", [0, 1, 130])
def test_uniforms_are_those_of_the_reference(kernels: CpuKernels, num: int) -> None:
    seeds = [(0x9E3779B97F4A7C15 * (i + 1)) % 2**64 for i in range(num)]
    positions, starts = [(7919 * i) % 2**31 for i in range(num)], [31 * i for i in range(num)]
    for stream in (0, 2, 3):
        expected = philox.uniforms(seeds, [stream] * num, positions, starts).tolist()
        assert kernels.uniforms(seeds, stream, positions, starts) == expected


@pytest.mark.slow
def test_results_do_not_depend_on_the_instruction_set() -> None:
    logits, law, *_ = truncated(5000)
    laws = residuals(5000)
    outputs: list[list[Any]] = []
    for name in ARCHITECTURES:
        kernels = CpuKernels(torch.float32, architecture=name)
        cut = logits.clone()
        kernels.truncate_(cut, law)
        outputs.append(
            [
                cut.tolist(),
                *(kernels.choose(x, law).tolist() for x in (logits, cut)),
                *(kernels.softmax(x, law.scales).tolist() for x in (logits, cut)),
                kernels.residual_mass(laws),
                kernels.sample_residual(laws, [0.37] * len(laws.scales)),
                kernels.uniforms(law.seeds, 2, law.positions, law.starts),
            ]
        )
    for other in outputs[1:]:
        assert other == outputs[0]
