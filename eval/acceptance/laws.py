"""Exact acceptance from the model's distributions: what a verification rule accepts on average, without running it.

Shapes: n contexts, K drafts, V vocabulary. p [n, K, V] fp64: the target's distributions before each draft.
q [n, K, V] fp64: the distributions that the drafts were drawn from, None where drafts are point masses (argmaxes; any
rule, temperature 0 with p a point mass as well). drafts [n, K].

*Conditional*, alpha_i: the probability that draft i is accepted given the context, the drafts before it and their
acceptance; the draft itself and the rule's noise are averaged out.

- "token" (Leviathan et al. 2023): sum_x min(p_i(x), q_i(x)).
- "coupled" (Daliri et al. 2024): sum_v m_i(v), where m_i(v) = 1 / sum_w max(p_w / p_v, q_w / q_v) is the probability
  that draft and target are both v.
- "block" (Sun et al. 2024): sum_x min(p_i(x), q_i(x) / r_{i-1}), with r_{i-1}, below, the probability that the drafts
  before are all accepted, given these drafts; r_0 = 1. Where r_{i-1} = 0 draft i is never reached, and alpha_i is 0.
- point masses: p_i(d_i) under every rule.

*Unconditional*, A_i: the probability that at least i drafts are accepted. It does not depend on K: a rule that judges
drafts one after the other knows nothing of later ones, and under "block", which does not, P(at least i | d_1..d_i) =
r_i = min(1, r_{i-1} p_i(d_i) / q_i(d_i)) whatever follows (by induction from K downwards: given d_1..d_i, fewer than i
have probability (1 - h_i) (1 - E r_{i+1}), where E r_{i+1} = r_i - Z_i and h_i = Z_i / (Z_i + 1 - r_i), that is
1 - r_i). So one set of contexts gives the mean acceptance length 1 + A_1 + ... + A_K of every K.

With drafts d ~ q an unbiased estimate of A_i per context is, the last draft averaged out (Rao-Blackwell):

- "token": prod_{j<i} min(1, p_j(d_j) / q_j(d_j)) alpha_i
- "block": sum_x min(r_{i-1} p_i(x), q_i(x))
- "coupled": prod_{j<i} m_j(d_j) / q_j(d_j) sum_v m_i(v), importance weights of at most 1, since m_j <= q_j
- point masses: prod_{j<=i} p_j(d_j), exactly.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.config import VerificationRule

ROWS = 8  # rows that are sorted and summed together: they stay in the processor's cache


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """Returns sum_x min(p(x), q(x)), [...], of p and q [..., V]."""
    return torch.minimum(p, q).sum(-1)


def coupled_masses(p: Tensor, q: Tensor) -> Tensor:
    """Returns m(v), [..., V]: the probability that a draft and the target's token that share their noise are both v
    (Daliri et al. 2024).

    max(p_w / p_v, q_w / q_v) is the first term where p_w / q_w >= p_v / q_v, so sums over tokens in the order of p / q
    give all m(v) in O(V log V).
    """
    rows = zip(p.flatten(0, -2).split(ROWS), q.flatten(0, -2).split(ROWS))
    return torch.cat([_coupled_masses(*some) for some in rows]).view_as(p)


def _coupled_masses(p: Tensor, q: Tensor) -> Tensor:
    ratio = (p / q).nan_to_num(0.0, posinf=torch.inf)  # 0 / 0 adds nothing to any sum
    order = torch.from_numpy(np.argsort(-ratio.cpu().numpy(), -1)).to(p.device)  # several times faster than torch's
    p_sorted, q_sorted = p.gather(-1, order), q.gather(-1, order)
    p_from = p_sorted.cumsum(-1)  # of tokens with at least this ratio
    q_below = torch.zeros_like(q)
    q_below[..., :-1] = q_sorted[..., 1:].flip(-1).cumsum(-1).flip(-1)
    masses = 1 / (p_from / p_sorted + q_below / q_sorted)
    return torch.zeros_like(p).scatter(-1, order, masses.nan_to_num(0.0))


def at_drafts(values: Tensor, drafts: Tensor) -> Tensor:
    """Returns the values [n, K] of the drafts [n, K], out of values [n, K, V]."""
    return values.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)


def conditional_acceptance(rule: VerificationRule, p: Tensor, q: Tensor | None, drafts: Tensor) -> Tensor:
    """Returns alpha_i, [n, K], see the module. rule: the verification rule; p, q, drafts: see the module."""
    if q is None:
        return at_drafts(p, drafts)
    if rule == "coupled":
        return coupled_masses(p, q).sum(-1)
    if rule == "token":
        return overlap(p, q)
    reached = _block_reached(at_drafts(p, drafts) / at_drafts(q, drafts))
    return (overlap(reached.unsqueeze(-1) * p, q) / reached).nan_to_num(0.0)


def unconditional_acceptance(rule: VerificationRule, p: Tensor, q: Tensor | None, drafts: Tensor) -> Tensor:
    """Returns A_i given the context, [n, K]: for sampled drafts an unbiased estimate, between 0 and 1. Parameters: as
    of `conditional_acceptance`."""
    if q is None:
        return at_drafts(p, drafts).cumprod(-1)
    if rule == "coupled":
        masses = coupled_masses(p, q)
        return _products_before(at_drafts(masses, drafts) / at_drafts(q, drafts)) * masses.sum(-1)
    ratios = at_drafts(p, drafts) / at_drafts(q, drafts)
    if rule == "token":
        return _products_before(ratios.clamp(max=1)) * overlap(p, q)
    return overlap(_block_reached(ratios).unsqueeze(-1) * p, q)


def mean_acceptance_length(unconditional: Tensor) -> Tensor:
    """Returns 1 + A_1 + ... + A_k for k = 1..K, [..., K], of A_i [..., K]: tokens per verification, the last one
    included."""
    return 1 + unconditional.cumsum(-1)


def entropy(p: Tensor) -> Tensor:
    """Returns the entropy, [...] in nats, of distributions p [..., V]."""
    return -torch.xlogy(p, p).sum(-1)


def _block_reached(ratios: Tensor) -> Tensor:
    """Returns r_0 .. r_{K-1} of block verification, [n, K], of p / q at the drafts, [n, K]."""
    reached = torch.ones_like(ratios)
    for i in range(1, ratios.shape[1]):
        reached[:, i] = (reached[:, i - 1] * ratios[:, i - 1]).clamp(max=1)
    return reached


def _products_before(factors: Tensor) -> Tensor:
    """Returns the product of the factors [n, K] before each, [n, K]; 1 for the first."""
    products = torch.ones_like(factors)
    products[:, 1:] = factors[:, :-1].cumprod(-1)
    return products
