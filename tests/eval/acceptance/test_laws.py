"""Acceptance computed from p and q is what the rules do, by exact enumeration on tiny vocabularies."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from specdec.eval.acceptance import laws
from specdec.eval.acceptance.laws import (
    conditional_acceptance,
    coupled_masses,
    entropy,
    mean_acceptance_length,
    overlap,
    unconditional_acceptance,
)
from specdec.kernels.philox import gumbel_noise
from support.enumeration import Context, RandomModel, rejection_law, target_law

EXACT = 1e-12
CONTEXT: Context = (1, 0)
K = 3


def models(vocab_size: int, seed: int) -> tuple[RandomModel, RandomModel]:
    return RandomModel(vocab_size, seed), RandomModel(vocab_size, 1000 + seed)


def law(model: RandomModel) -> Callable[[Context], Tensor]:
    return lambda context: model.logits(context).softmax(-1)


def random_laws(rows: int, vocab_size: int, seed: int) -> Tensor:
    """Some of the probabilities are 0, some equal."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64)
    logits = torch.where(torch.rand(rows, vocab_size, generator=generator) < 0.2, logits.round(), logits)
    zeros = torch.rand(rows, vocab_size, generator=generator) < 0.3
    zeros[:, 0] = False
    return logits.masked_fill(zeros, -torch.inf).softmax(-1)


def masses_by_definition(p: Tensor, q: Tensor) -> Tensor:
    """Daliri et al. 2024, in O(V^2): p, q [V]."""
    masses = torch.zeros_like(p)
    for v in range(len(p)):
        if p[v] > 0 and q[v] > 0:
            masses[v] = 1 / torch.maximum(p / p[v], q / q[v]).sum()
    return masses


def every_draft(
    models: tuple[RandomModel, RandomModel], k: int, *, greedy: bool = False, context: Context = CONTEXT
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All drafts [n, k], their probabilities [n], and p, q [n, k, V] before each of them."""
    target, draft = models
    if greedy:
        drafts: Context = ()
        for _ in range(k):
            drafts = (*drafts, int(draft.logits((*context, *drafts)).argmax()))
        chains = {drafts: 1.0}
    else:
        chains = target_law(law(draft), context, k)
    p, q = (
        torch.stack([torch.stack([law(m)((*context, *d[:i])) for i in range(k)]) for d in chains])
        for m in (target, draft)
    )
    return torch.tensor(list(chains)), torch.tensor(list(chains.values()), dtype=torch.float64), p, q


def expected(rule: str, found: tuple[Tensor, Tensor, Tensor, Tensor], *, greedy: bool = False) -> Tensor:
    """A_i [k], averaged over all drafts."""
    drafts, weights, p, q = found
    return weights @ unconditional_acceptance(rule, p, None if greedy else q, drafts)


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 40])
def test_coupled_masses_are_the_definition(vocab_size: int) -> None:
    p, q = random_laws(60, vocab_size, 0), random_laws(60, vocab_size, 1)
    p[:5], q[5:10] = q[:5], p[5:10]  # equal laws
    by_definition = torch.stack([masses_by_definition(a, b) for a, b in zip(p, q)])
    assert torch.allclose(coupled_masses(p, q), by_definition, rtol=EXACT, atol=1e-15)
    assert torch.allclose(coupled_masses(p, q)[:10], p[:10], rtol=EXACT, atol=1e-15)
    assert (coupled_masses(p, q) <= torch.minimum(p, q) + EXACT).all()


def test_coupled_masses_of_extreme_laws() -> None:
    p = torch.tensor([[1e-30, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    q = torch.tensor([[1.0, 1e-40, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    by_definition = torch.stack([masses_by_definition(a, b) for a, b in zip(p, q)])
    assert torch.allclose(coupled_masses(p, q), by_definition, rtol=EXACT, atol=0)


def test_coupled_masses_are_how_often_shared_noise_agrees() -> None:
    p = random_laws(1, 6, 4)[0]
    q = 0.6 * p + 0.4 * random_laws(1, 6, 5)[0]
    n = 100_000
    noise = torch.from_numpy(gumbel_noise([0] * n, [0] * n, range(n), [0] * n, 6))
    both = (p.log() + noise).argmax(-1), (q.log() + noise).argmax(-1)
    counts = torch.bincount(both[0][both[0] == both[1]], minlength=6) / n
    exact = coupled_masses(p[None], q[None])[0]
    assert 0.2 < exact.sum() < 0.9
    assert ((counts - exact).abs() < 5 * (exact / n).sqrt() + EXACT).all()


@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(("vocab_size", "seed"), [(2, 0), (3, 1), (3, 2)])
def test_acceptance_of_every_length_is_what_the_rule_does(vocab_size: int, seed: int, rule: str, greedy: bool) -> None:
    """One set of A_i for every K: the rule itself, run with K drafts down every path, accepts i that often."""
    pair = models(vocab_size, seed)
    found = every_draft(pair, K, greedy=greedy)
    ours = expected(rule, found, greedy=greedy)
    for k in range(1, K + 1):
        emitted, accepted = rejection_law(*pair, CONTEXT, k, block=rule == "block", greedy_drafts=greedy)
        exact = [sum(p for tokens, p in emitted.items() if len(tokens) > i) for i in range(1, k + 1)]
        assert torch.allclose(ours[:k], torch.tensor(exact, dtype=torch.float64), atol=EXACT, rtol=0)
        assert mean_acceptance_length(ours)[k - 1].item() == pytest.approx(1 + accepted, abs=EXACT)
    assert 0.02 < ours[0] < 0.98


@pytest.mark.parametrize("seed", [0, 1])
def test_coupled_acceptance_is_that_of_the_tree(seed: int) -> None:
    """P(at least i) summed over all drafts that could match, by the definition of m."""
    target, draft = models(4, seed)
    exact, matched = [], {(): 1.0}
    for _ in range(K):
        longer = {}
        for tokens, probability in matched.items():
            context = (*CONTEXT, *tokens)
            for v, mass in enumerate(masses_by_definition(law(target)(context), law(draft)(context)).tolist()):
                longer[(*tokens, v)] = probability * mass
        matched = longer
        exact.append(sum(matched.values()))
    ours = expected("coupled", every_draft((target, draft), K))
    assert torch.allclose(ours, torch.tensor(exact, dtype=torch.float64), atol=EXACT, rtol=0)


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_rules_agree_on_point_masses_and_on_equal_laws(rule: str) -> None:
    pair = models(3, 5)
    drafts, _, p, _ = every_draft(pair, K, greedy=True)
    products = p[0, range(K), drafts[0]].cumprod(0)
    assert torch.allclose(unconditional_acceptance(rule, p, None, drafts)[0], products)
    drafts, _, p, _ = every_draft((pair[0], pair[0]), K)
    assert torch.allclose(unconditional_acceptance(rule, p, p, drafts), torch.ones(1, dtype=torch.float64))


def test_estimates_are_probabilities_and_block_accepts_the_most() -> None:
    found = every_draft(models(4, 3), K)
    per_rule = {rule: unconditional_acceptance(rule, *found[2:], found[0]) for rule in ("coupled", "token", "block")}
    for estimates in per_rule.values():
        assert estimates.min() >= 0
        assert estimates.max() <= 1 + EXACT
    assert (per_rule["block"] >= per_rule["token"] - EXACT).all()
    means = [float(found[1] @ per_rule[rule].sum(1)) for rule in ("coupled", "token", "block")]
    assert means == sorted(means)
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("seed", [1, 5, 6])
@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_conditional_acceptance_is_given_the_drafts_before(rule: str, seed: int) -> None:
    """P(at least 2, d_1 = x) / P(at least 1, d_1 = x), from the rule itself."""
    pair = models(3, seed)
    drafts, _, p, q = every_draft(pair, 2)
    ours = conditional_acceptance(rule, p, q, drafts)
    if rule == "coupled":
        assert torch.allclose(ours, coupled_masses(p, q).sum(-1))
        return
    assert torch.allclose(ours[:, 0], overlap(p[:, 0], q[:, 0]))
    emitted, _ = rejection_law(*pair, CONTEXT, 2, block=rule == "block", greedy_drafts=False)
    for row, x in zip(ours, drafts[:, 0].tolist()):
        reached, accepted = (sum(w for t, w in emitted.items() if len(t) > i and t[0] == x) for i in (1, 2))
        if reached > 0:
            assert row[1].item() == pytest.approx(accepted / reached, abs=EXACT)


def test_entropy_is_in_nats() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(entropy(p), torch.tensor([2.0, 1.0], dtype=torch.float64).log())


def test_mutants_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would pass a glance at plausible numbers."""
    pair = models(3, 1)
    found = every_draft(pair, K)
    exact = {block: rejection_law(*pair, CONTEXT, K, block=block, greedy_drafts=False)[1] for block in (False, True)}

    def error(rule: str) -> float:
        return abs(float(expected(rule, found).sum()) - exact[rule == "block"])

    assert max(error("token"), error("block")) < EXACT
    with monkeypatch.context() as patch:  # the drafts' own product in place of what came before them
        patch.setattr(laws, "_products_before", lambda factors: factors.cumprod(-1))
        assert error("token") > 1e-3
    drafts, weights, p, q = found
    shifted = weights @ unconditional_acceptance("block", p, q, drafts.roll(1, 1))
    assert abs(float(shifted.sum()) - exact[True]) > 1e-3
    for rule, other in itertools.permutations(["token", "block"], 2):
        assert abs(float(expected(rule, found).sum()) - exact[other == "block"]) > 1e-3
