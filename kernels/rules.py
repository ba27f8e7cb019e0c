"""Verification rules: which drafts to accept and what to emit after them. No model here.

`Backend.verify` decides with them; backends may do the same in other ways.

Glossary. *Draft tokens* d_1..d_k were proposed from distributions q_1..q_k. The target's distributions p_1..p_{k+1} are
known before each draft and after the last; p and q are both taken after all of the request's transforms. *Accepted*
tokens are a prefix of the drafts; after it one more token is always emitted: the *recovered* token where a draft was
rejected, the *bonus* token where none was. A *point mass* is a distribution that has one token only.

Rules, all of which keep the target's distribution:

- *exact match* (`match_choices`): accept drafts while they equal the target's own choice, and emit that choice. The
  choice is the argmax at temperature 0 ("greedy"), and a sample whose noise the drafts share in "coupled" verification
  (Daliri et al. 2024, arXiv 2408.07978). The output is the target's own whatever the drafts are.
- *rejection* (`verify_by_rejection`): "token" (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023,
  arXiv 2302.01318) and "block" (Sun et al. 2024, arXiv 2403.10444). The drafts must have been drawn from exactly the
  q that is given here; a greedy draft is a point mass.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from specdec.kernels.decisions import Residuals
from specdec.kernels.operations import Operations
from specdec.kernels.philox import Stream


def match_choices(choices: Seq[int], draft_token_ids: Seq[int]) -> list[int]:
    """Returns the tokens that exact match emits: the target's choices up to and including the first that the drafts did
    not foresee.

    choices: [k+1], what the target chooses in each row.
    draft_token_ids: [k], one sequence's drafts.
    """
    accepted = 0
    while accepted < len(draft_token_ids) and draft_token_ids[accepted] == choices[accepted]:
        accepted += 1
    return list(choices[: accepted + 1])


@dataclass(frozen=True, eq=False)
class Proposal:
    """One sequence's drafts before a rejection rule."""

    draft_token_ids: list[int]
    """[k]: d_1..d_k."""
    first_row: int
    """Row of p_1 in target_probs; p_2, p_3, ... follow."""
    prob_row: int
    """Row of q_1..q_k in draft_probs; -1 where the drafts are point masses."""
    block: bool
    """Whether the rule is block verification; otherwise it is token rejection."""
    seed: int
    """The request's seed."""
    start: int
    """Absolute position of d_1."""


def verify_by_rejection(
    kernels: Operations, target_probs: Tensor, draft_probs: Tensor | None, proposals: Seq[Proposal]
) -> list[list[int]]:
    """Verifies drafts that may be rejected: returns the tokens that each sequence emits, [B] of 1 to k+1; the last is
    -1 where a distribution is not finite.

    kernels: draws the random numbers and the residual distributions' tokens.
    target_probs: [R, V], the target's distributions.
    draft_probs: [Q, K, V], the distributions that drafts were drawn from; None where all are point masses.
    proposals: [B], each sequence's drafts and rule.
    """
    # 1) How likely the target finds each draft, against what it was drawn with.
    ratios = _ratios(target_probs, draft_probs, proposals)
    # r_i of block verification: how much of the drafts' mass the target still wants after i of them; r_0 = 1.
    reached = [_reached(row) if proposal.block else [1.0] * (len(row) + 1) for proposal, row in zip(proposals, ratios)]
    # 2) How many drafts stay.
    thresholds = _thresholds(kernels, target_probs, draft_probs, proposals, ratios, reached)
    accepted = _accepted(kernels, proposals, thresholds)
    # 3) The token after them, from what the target wanted more of than the drafts gave: that restores its distribution.
    laws = [(b, a) for b, a in enumerate(accepted)]
    residuals = _residuals(target_probs, draft_probs, proposals, reached, laws)
    last = kernels.sample_residual(residuals, _draw(kernels, proposals, Stream.RESIDUAL, laws))
    return [[*proposal.draft_token_ids[:a], token] for proposal, a, token in zip(proposals, accepted, last)]


def _ratios(target_probs: Tensor, draft_probs: Tensor | None, proposals: Seq[Proposal]) -> list[list[float]]:
    """Returns p_i(d_i) / q_i(d_i), [B] of [k]."""
    # Drafts of all sequences in one list, so that each tensor, which may be on a device, is read once.
    where = [(b, i, d) for b, proposal in enumerate(proposals) for i, d in enumerate(proposal.draft_token_ids)]
    ratios: list[list[float]] = [[] for _ in proposals]
    if not where:
        return ratios
    tokens = [d for _, _, d in where]
    p = target_probs[[proposals[b].first_row + i for b, i, _ in where], tokens].tolist()
    q = [1.0] * len(where)  # a point mass gives its token all
    drawn = [n for n, (b, _, _) in enumerate(where) if proposals[b].prob_row >= 0]
    if drawn and draft_probs is not None:
        rows, steps = [proposals[where[n][0]].prob_row for n in drawn], [where[n][1] for n in drawn]
        for n, value in zip(drawn, draft_probs[rows, steps, [tokens[n] for n in drawn]].tolist()):
            q[n] = value
    for (b, _, _), p_d, q_d in zip(where, p, q):
        ratios[b].append(p_d / q_d)
    return ratios


def _reached(ratios: list[float]) -> list[float]:
    """Returns r_0..r_k of block verification (Sun et al. 2024): r_i = min(1, r_{i-1} p_i(d_i) / q_i(d_i)). NaN where a
    distribution is not finite; nothing passes then."""
    reached = [1.0]
    for ratio in ratios:
        reached.append(min(reached[-1] * ratio, 1.0))  # in this order NaN stays
    return reached


def _thresholds(
    kernels: Operations,
    target_probs: Tensor,
    draft_probs: Tensor | None,
    proposals: Seq[Proposal],
    ratios: list[list[float]],
    reached: list[list[float]],
) -> list[list[float]]:
    """Returns the probabilities that uniforms are compared with, [B] of [k]: min(1, p/q) of "token" (Leviathan et al.
    2023), h_i of "block" (Sun et al. 2024), which after the last draft is r_k."""
    thresholds = [
        reached[b][1:] if proposal.block else [min(ratio, 1.0) for ratio in ratios[b]]
        for b, proposal in enumerate(proposals)
    ]
    inner = [(b, i) for b, proposal in enumerate(proposals) if proposal.block for i in range(1, len(ratios[b]))]
    if inner:
        residuals = _residuals(target_probs, draft_probs, proposals, reached, inner)
        for (b, i), mass in zip(inner, kernels.residual_mass(residuals)):
            r = reached[b][i]
            thresholds[b][i - 1] = 1.0 if r == 1 else mass / (mass + 1 - r)
    return thresholds


def _accepted(kernels: Operations, proposals: Seq[Proposal], thresholds: list[list[float]]) -> list[int]:
    """Returns how many drafts each sequence accepts, [B]: "token" up to the first uniform that fails, "block" up to the
    last that does not."""
    uniforms = iter(
        _draw(kernels, proposals, Stream.ACCEPT, [(b, i) for b, row in enumerate(thresholds) for i in range(len(row))])
    )
    accepted = []
    for proposal, row in zip(proposals, thresholds):
        passed = [next(uniforms) < threshold for threshold in row]
        if proposal.block:
            accepted.append(max((i for i, ok in enumerate(passed, 1) if ok), default=0))
        else:
            accepted.append(passed.index(False) if False in passed else len(passed))
    return accepted


def _residuals(
    target_probs: Tensor,
    draft_probs: Tensor | None,
    proposals: Seq[Proposal],
    reached: list[list[float]],
    laws: list[tuple[int, int]],
) -> Residuals:
    """Returns the residual distribution after i accepted drafts of a sequence, for each (sequence, i) in `laws`:
    (r_i p_{i+1} - q_{i+1})+ up to a factor, and p_{k+1} after all k drafts."""
    p_rows, scales, q_rows, excluded = [], [], [], []
    num_steps = 0 if draft_probs is None else draft_probs.shape[1]
    for b, i in laws:
        proposal = proposals[b]
        more, drawn = i < len(proposal.draft_token_ids), proposal.prob_row >= 0
        p_rows.append(proposal.first_row + i)
        scales.append(reached[b][i])
        q_rows.append(proposal.prob_row * num_steps + i if more and drawn else -1)
        excluded.append(proposal.draft_token_ids[i] if more and not drawn else -1)
    q = None if draft_probs is None else draft_probs.flatten(0, 1)
    return Residuals(target_probs, p_rows, scales, q, q_rows, excluded)


def _draw(kernels: Operations, proposals: Seq[Proposal], stream: Stream, places: list[tuple[int, int]]) -> list[float]:
    """Returns uniforms for the tokens at the given places, each a (sequence, number of drafts before the token)."""
    return kernels.uniforms(
        [proposals[b].seed for b, _ in places],
        stream,
        [proposals[b].start + i for b, i in places],
        [proposals[b].start for b, _ in places],
    )
