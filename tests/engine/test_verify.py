"""The rules on single cases, by hand; tests/engine/test_lossless.py has their laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specdec.kernels.philox import uniforms
from specdec.kernels.reference import ReferenceKernels
from specdec.kernels.rules import Proposal, match_choices, verify_by_rejection
from specdec.request.seeds import Stream


class GivenUniforms(ReferenceKernels):
    """Uniforms by (stream, position) instead of random ones; 0 unless given."""

    def __init__(self, given: dict[tuple[Stream, int], float]) -> None:
        super().__init__(torch.device("cpu"), torch.float64)
        self.given = given

    def uniforms(self, seeds: list[int], stream: int, positions: list[int], starts: list[int]) -> list[float]:
        return [self.given.get((Stream(stream), position), 0.0) for position in positions]


def test_drafts_are_accepted_while_they_match() -> None:
    for drafts, emitted in (([1, 0], [1, 0, 2]), ([2, 0], [1]), ([1, 1], [1, 0]), ([], [1])):
        assert match_choices([1, 0, 2][: len(drafts) + 1], drafts) == emitted


def random_laws(seed: int, k: int, vocab_size: int) -> tuple[Tensor, Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.rand(n, vocab_size, generator=generator, dtype=torch.float64) for n in (k + 1, k))
    drafts = torch.randint(vocab_size, (k,), generator=generator).tolist()
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True), drafts


@pytest.mark.parametrize("seed", range(20))
def test_token_rejection_on_both_sides_of_every_edge(seed: int) -> None:
    k, vocab_size, start = 3, 5, 10
    p, q, drafts = random_laws(seed, k, vocab_size)
    proposal = Proposal(drafts, 0, 0, block=False, seed=0, start=start)

    def emitted(given: dict[tuple[Stream, int], float]) -> list[int]:
        return verify_by_rejection(GivenUniforms(given), p, q[None], [proposal])[0]

    ratios = [float(p[i, d] / q[i, d]) for i, d in enumerate(drafts)]
    for accepted in range(k + 1):
        given: dict[tuple[Stream, int], float] = {}
        if accepted < k:
            if ratios[accepted] >= 1:
                continue
            given[Stream.ACCEPT, start + accepted] = ratios[accepted]  # u < ratio is false exactly here
        law = (p[accepted] - q[accepted]).clamp(min=0) if accepted < k else p[k]
        edges = (law / law.sum()).cumsum(0)
        for token in range(vocab_size):
            if law[token] < 1e-9:
                continue
            for u in ((edges[token - 1].item() if token else 0.0) + 1e-12, edges[token].item() - 1e-12):
                assert emitted(given | {(Stream.RESIDUAL, start + accepted): u}) == [*drafts[:accepted], token]
        if accepted < k:
            given[Stream.ACCEPT, start + accepted] -= 1e-12
            assert len(emitted(given)) > accepted + 1


@pytest.mark.parametrize("seed", range(20))
def test_block_verification_on_both_sides_of_every_threshold(seed: int) -> None:
    """h_i written out from Sun et al. 2024; every uniform but one fails, and acceptance reaches up to that one."""
    k, start = 3, 10
    p, q, drafts = random_laws(seed, k, 5)
    reached = [1.0]
    for i, d in enumerate(drafts):
        reached.append(min(1.0, reached[-1] * float(p[i, d] / q[i, d])))
    proposal = Proposal(drafts, 0, 0, block=True, seed=0, start=start)
    for i in range(1, k + 1):
        mass = float((reached[i] * p[i] - q[i]).clamp(min=0).sum()) if i < k else 0.0
        h = mass / (mass + 1 - reached[i]) if i < k else reached[i]
        for u, accepted in ((h - 1e-12, i), (h + 1e-12, 0)):
            given = {(Stream.ACCEPT, start + j): 1 - 2**-53 for j in range(k)} | {(Stream.ACCEPT, start + i - 1): u}
            others = [j for j in range(1, k + 1) if j != i and reached[j] == 1]
            expected = max([accepted, *others])
            assert len(verify_by_rejection(GivenUniforms(given), p, q[None], [proposal])[0]) == expected + 1


def test_sequences_of_a_batch_keep_to_their_own_rows() -> None:
    """Mixed rules, lengths, sampled and greedy drafts together give what each gives alone."""
    kernels = ReferenceKernels(torch.device("cpu"), torch.float64)
    proposals, rows, laws, alone = [], [], [], []
    for seed in range(30):
        k = seed % 5
        p, q, drafts = random_laws(seed, k, 6)
        greedy_drafts = seed % 3 == 0
        proposal = Proposal(drafts, 0, -1 if greedy_drafts else 0, block=seed % 2 == 0, seed=seed, start=7 + seed)
        alone += verify_by_rejection(kernels, p, None if greedy_drafts or k == 0 else q[None], [proposal])
        proposals.append(replace(proposal, first_row=sum(map(len, rows)), prob_row=-1 if greedy_drafts else len(laws)))
        rows.append(p)
        if not greedy_drafts:
            laws.append(torch.cat([q, torch.full((4 - k, 6), float("nan"))]))  # what lies beyond its drafts is not read
    together = verify_by_rejection(kernels, torch.cat(rows), torch.stack(laws), proposals)
    assert together == alone
    assert {len(tokens) for tokens in together} > {1, 2, 3}


def test_uniforms_are_keyed_by_place_and_iteration() -> None:
    """One accepted draft and the bonus after it: the numbers are those of (seed, stream, position, start)."""
    kernels = ReferenceKernels(torch.device("cpu"), torch.float64)
    for seed in range(200):
        p, q, drafts = random_laws(seed, 1, 5)
        (emitted,) = verify_by_rejection(
            kernels, p, q[None], [Proposal(drafts, 0, 0, block=False, seed=seed, start=40)]
        )
        accept = uniforms([seed], [Stream.ACCEPT], [40], [40])[0] < float(p[0, drafts[0]] / q[0, drafts[0]])
        assert len(emitted) == 1 + accept
        law = p[1] if accept else (p[0] - q[0]).clamp(min=0)
        u = uniforms([seed], [Stream.RESIDUAL], [40 + int(accept)], [40])[0]
        assert emitted[-1] == int((law.cumsum(0) / law.sum() > u).nonzero()[0])


def test_an_empty_residual_falls_back_to_the_target() -> None:
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    given = {(Stream.ACCEPT, 3): 1.0, (Stream.RESIDUAL, 3): 0.7}
    assert verify_by_rejection(GivenUniforms(given), p, p[None, :1], [Proposal([0], 0, 0, False, 0, 3)]) == [[1]]


def test_laws_that_are_not_finite_are_seen() -> None:
    p = torch.tensor([[0.5, 0.5], [float("nan"), 0.0]], dtype=torch.float64)
    assert verify_by_rejection(GivenUniforms({}), p, None, [Proposal([0], 0, -1, False, 0, 3)]) == [[0, -1]]


@pytest.mark.parametrize(
    ("bad", "block", "emitted"), [(0, False, [-1]), (1, False, [0, -1]), (0, True, [-1]), (1, True, [1])]
)
def test_no_draft_is_accepted_under_a_law_that_is_not_finite(bad: int, block: bool, emitted: list[int]) -> None:
    """Though uniforms are 0. Where block verification cannot tell whether to accept the first draft, it does not."""
    p = torch.full((3, 2), 0.5, dtype=torch.float64)
    p[bad] = float("nan")
    assert verify_by_rejection(GivenUniforms({}), p, None, [Proposal([0, 1], 0, -1, block, 0, 3)]) == [emitted]
