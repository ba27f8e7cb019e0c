"""The rejection rules on the device keep the target's law: by the definitions, with uniforms that the tests choose.

Kernels are compiled with the functions that they call, so those can be replaced in the interpreter only.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.decisions import BLOCK_VERIFICATION, TOKEN_REJECTION, Drafts, Residuals, VerifyBatch
from specdec.kernels.reference import residual_law
from specdec.kernels.triton import Batch, Decider, rules
from support.enumeration import Context, Law, RandomModel, completed, distance, target_law
from support.sampled_rows import sampling

if not triton.knobs.runtime.interpret:
    pytest.skip("uniforms can be replaced in Triton's interpreter only", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, for what no lane goes on to use

V, K = 3, 2
CONTEXT = (1,)
TARGET, DRAFT = (RandomModel(V, seed, zeros=0.1) for seed in (36, 86))  # ratios p / q of all sorts, 0 among them
RULES = pytest.mark.parametrize("rule", [TOKEN_REJECTION, BLOCK_VERIFICATION], ids=["token", "block"])


@triton.jit
def given_by_bits(seed, stream, position, start):
    """Bit i of the seed: whether draft i passes any test that it can pass."""
    return tl.where(((seed >> (position - start)) & 1) == 1, 0.0, 1.0 - 1.1102230246251565e-16)


@triton.jit
def given_by_seed(seed, stream, position, start):
    return seed.to(tl.float64, bitcast=True)


def emitted(
    paths: list[tuple[Context, int]], rule: int, *, sampled: bool
) -> tuple[list[list[int]], list[Tensor], Residuals]:
    """Drafts and seeds -> tokens; each path's p [K + 1, V]; the laws of the last tokens, p and q being the device's."""
    contexts = [(*CONTEXT, *drafts[:i]) for drafts, _ in paths for i in range(K + 1)]
    logits = torch.stack([TARGET.logits(c) for c in contexts]).float()
    q = torch.stack([DRAFT.logits(c) for c in contexts]).softmax(-1).float().view(-1, K + 1, V)[:, :K].contiguous()
    num = len(paths)
    verification = VerifyBatch(
        first_rows=[n * (K + 1) for n in range(num)],
        drafts=Drafts(
            [list(drafts) for drafts, _ in paths],
            list(range(num)) if sampled else [-1] * num,
            q if sampled else None,
        ),
        rules=[rule] * num,
        rows=sampling(num, seeds=[seed for _, seed in paths], positions=[5] * num),
        edits=[None] * num,
    )
    decider = Decider(Batch(num, K, torch.device("cpu")), V)
    decider.batch.pack_verification(verification, verification.first_rows)
    tokens = decider.emit(logits, decider.batch.drafts, verification.drafts.probs).tolist()
    p_rows, q_rows, excluded, _ = decider._final_laws.tolist()
    laws = Residuals(logits, p_rows, decider._final_scales.tolist(), q.flatten(0, 1), q_rows, excluded)
    return tokens, list(logits.view(num, K + 1, V)), laws


def thresholds(p: Tensor, q: Tensor, drafts: Context, rule: int) -> list[float]:
    """min(1, p/q) of "token", h_i of "block", as the papers have them."""
    p, q = p.double(), q.double()
    ratios = [float(p[i, d] / q[i, d]) for i, d in enumerate(drafts)]
    if rule == TOKEN_REJECTION:
        return [min(1.0, ratio) for ratio in ratios]
    reached, h = 1.0, []
    for i, ratio in enumerate(ratios, 1):
        reached = min(1.0, reached * ratio)
        mass = float((reached * p[i] - q[i]).clamp(min=0).sum()) if i < len(drafts) else 0.0
        inner = i < len(drafts) and reached < 1
        h.append(mass / (mass + 1 - reached) if inner else reached)
    return h


def draft_laws(laws: Residuals, drafts: Context, n: int, *, sampled: bool) -> Tensor:
    """q [K, V] of path n."""
    assert laws.q is not None
    return laws.q.view(-1, K, V)[n] if sampled else torch.nn.functional.one_hot(torch.tensor(drafts), V)


def all_drafts(*, sampled: bool) -> Law:
    if sampled:
        return target_law(lambda c: DRAFT.logits(c).softmax(-1), CONTEXT, K)
    drafts: Context = ()
    for _ in range(K):
        drafts = (*drafts, int(DRAFT.logits((*CONTEXT, *drafts)).argmax()))
    return {drafts: 1.0}


@pytest.mark.slow
@RULES
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "greedy"])
def test_the_law_of_an_iteration_is_the_targets(monkeypatch: pytest.MonkeyPatch, rule: int, sampled: bool) -> None:
    """All drafts, and every outcome of their uniforms; to some units of the fp32 that p and q have."""
    monkeypatch.setattr(rules, "uniform", given_by_bits)
    starts = all_drafts(sampled=sampled)
    paths = list(product(starts, range(2**K)))
    tokens, p, laws = emitted(paths, rule, sampled=sampled)
    law: Law = defaultdict(float)
    for n, (drafts, bits) in enumerate(paths):
        probability = starts[drafts]
        for i, h in enumerate(thresholds(p[n], draft_laws(laws, drafts, n, sampled=sampled), drafts, rule)):
            probability *= h if bits >> i & 1 else 1 - h
        last = residual_law(laws, n)
        for token, share in enumerate((last / last.sum()).tolist()):
            law[(*tokens[n][:-1], token)] += probability * share
        assert probability == 0 or last[tokens[n][-1]] > 0
    whole = completed(law, lambda c: TARGET.logits(c).softmax(-1), CONTEXT, K + 1)
    assert distance(whole, target_law(lambda c: TARGET.logits(c).softmax(-1), CONTEXT, K + 1)) < 1e-6


@pytest.mark.slow
@RULES
def test_thresholds_are_those_of_the_definitions(monkeypatch: pytest.MonkeyPatch, rule: int) -> None:
    """Uniforms just below and just above each threshold; all of a sequence's are the same."""
    monkeypatch.setattr(rules, "uniform", given_by_seed)
    starts = [drafts for drafts, q in all_drafts(sampled=True).items() if q > 0]
    _, p, laws = emitted([(drafts, 0) for drafts in starts], rule, sampled=True)
    paths, accepted = [], []
    for n, drafts in enumerate(starts):
        h = thresholds(p[n], draft_laws(laws, drafts, n, sampled=True), drafts, rule)
        for u in (t * (1 + side * 1e-9) for t in h for side in (-1, 1) if 0 < t * (1 + side * 1e-9) < 1):
            passed = [u < t for t in h]
            if rule == BLOCK_VERIFICATION:
                accepted.append(max((i for i, ok in enumerate(passed, 1) if ok), default=0))
            else:
                accepted.append([*passed, False].index(False))
            paths.append((drafts, int(np.float64(u).view(np.int64))))
    tokens, _, _ = emitted(paths, rule, sampled=True)
    assert [len(row) - 1 for row in tokens] == accepted
    assert len(set(accepted)) == K + 1
