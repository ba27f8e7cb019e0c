"""Verification: which drafts to accept and what to emit after them. Pure functions, no model.

Glossary. *Draft tokens* d_1..d_K were proposed with probabilities q. The target's probabilities p are
known at K+1 positions: before each draft and after the last. *Accepted* tokens are a prefix of the
drafts; after it one more token is always emitted: the *recovered* token where a draft was rejected, the
*bonus* token where none was.

Shapes: B sequences, K draft tokens (the most of any sequence), V vocabulary. Sequences with fewer
drafts are padded; `num_draft_tokens` tells. Everything is dtype-generic.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.sampling import greedy_tokens, sample

PAD = -1


@dataclass(frozen=True)
class VerifyResult:
    """num_accepted_tokens [B]; output_token_ids [B, K+1]: accepted tokens, then one more, then `PAD`."""

    num_accepted_tokens: Tensor
    output_token_ids: Tensor


def verify_greedy(target_logits: Tensor, draft_token_ids: Tensor, num_draft_tokens: Tensor) -> VerifyResult:
    """Accepts drafts while they equal the target's argmax (ties: lowest id), then emits that argmax.

    target_logits [B, K+1, V], draft_token_ids [B, K] int64, num_draft_tokens [B] int64.
    """
    choices = greedy_tokens(target_logits).tolist()  # [B, K+1]
    output = target_logits.new_full((len(choices), len(choices[0])), PAD, dtype=torch.int64)
    accepted = torch.zeros_like(num_draft_tokens)
    rows = zip(choices, draft_token_ids.tolist(), num_draft_tokens.tolist(), strict=True)
    for b, (chosen, drafts, count) in enumerate(rows):
        emitted = match_choices(chosen, drafts[:count])
        accepted[b] = len(emitted) - 1
        output[b, : len(emitted)] = torch.tensor(emitted, device=output.device)
    return VerifyResult(accepted, output)


def match_choices(choices: Seq[int], draft_token_ids: Seq[int]) -> list[int]:
    """One sequence's greedy verification on the host: the target's choices [k+1] and the drafts [k] -> the tokens
    emitted, which are the choices up to and including the first that the drafts did not foresee."""
    accepted = 0
    while accepted < len(draft_token_ids) and draft_token_ids[accepted] == choices[accepted]:
        accepted += 1
    return list(choices[: accepted + 1])


def verify_token(
    target_probs: Tensor,
    draft_token_ids: Tensor,
    draft_probs: Tensor | None,
    num_draft_tokens: Tensor,
    accept_uniforms: Tensor,
    last_uniforms: Tensor,
) -> VerifyResult:
    """Token rejection sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).

    target_probs [B, K+1, V], draft_token_ids [B, K] int64, draft_probs [B, K, V]: the distribution each
    draft was really drawn from (a one-hot row for a greedy draft; None: all are greedy),
    num_draft_tokens [B] int64, accept_uniforms [B, K], last_uniforms [B, K+1]: independent, in [0, 1); the
    emitted token uses the uniform of its own position. The output's law is the target's.
    """
    if draft_probs is None:
        draft_probs = point_masses(draft_token_ids, target_probs)
    ratios = acceptance_probabilities(target_probs, draft_token_ids, draft_probs)
    accepted = count_accepted(accept_uniforms < ratios, num_draft_tokens)
    probs = last_token_probs(target_probs, draft_probs, accepted, num_draft_tokens)
    last = sample(probs, last_uniforms.gather(1, accepted.unsqueeze(1)).squeeze(1))
    return emit(draft_token_ids, accepted, last)


def point_masses(token_ids: Tensor, like: Tensor) -> Tensor:
    """token_ids [...] -> one-hot distributions [..., V] with the vocabulary and dtype of `like` [..., V]."""
    probs = torch.zeros(*token_ids.shape, like.shape[-1], dtype=like.dtype, device=like.device)
    return probs.scatter_(-1, token_ids.unsqueeze(-1), 1.0)


def acceptance_probabilities(target_probs: Tensor, draft_token_ids: Tensor, draft_probs: Tensor) -> Tensor:
    """min(1, p(d) / q(d)) [B, K]; 0 where q(d) is 0, which no drawn draft has (padding may)."""
    ids = draft_token_ids.unsqueeze(-1)
    p = target_probs[:, :-1].gather(2, ids).squeeze(-1)
    q = draft_probs.gather(2, ids).squeeze(-1)
    return torch.where(q > 0, p / q, torch.zeros_like(p)).clamp(max=1)


def last_token_probs(
    target_probs: Tensor, draft_probs: Tensor, num_accepted_tokens: Tensor, num_draft_tokens: Tensor
) -> Tensor:
    """The law [B, V] of the token emitted after the accepted ones, up to a factor.

    The residual (p - q)+ after a rejection, p after the last draft. A residual that rounding emptied
    means p = q up to rounding: p then.
    """
    rows = torch.arange(len(num_accepted_tokens), device=target_probs.device)
    p = target_probs[rows, num_accepted_tokens]
    if draft_probs.shape[1] == 0:
        return p
    q = draft_probs[rows, num_accepted_tokens.clamp(max=draft_probs.shape[1] - 1)]
    residual = (p - q).clamp(min=0)
    rejected = (num_accepted_tokens < num_draft_tokens) & (residual.sum(-1) > 0)
    return torch.where(rejected.unsqueeze(-1), residual, p)


def count_accepted(accepted: Tensor, num_draft_tokens: Tensor) -> Tensor:
    """accepted [B, K] bool -> length [B] of the leading run of True within each sequence's drafts."""
    drafted = torch.arange(accepted.shape[1], device=accepted.device) < num_draft_tokens.unsqueeze(1)
    return (accepted & drafted).long().cumprod(1).sum(1)


def emit(draft_token_ids: Tensor, num_accepted_tokens: Tensor, last_token_ids: Tensor) -> VerifyResult:
    """The accepted prefix of the drafts [B, K] followed by the last token [B]."""
    output = torch.cat([draft_token_ids, torch.full_like(last_token_ids, PAD).unsqueeze(1)], 1)
    columns = torch.arange(output.shape[1], device=output.device)
    output = output.masked_fill(columns >= num_accepted_tokens.unsqueeze(1), PAD)
    output.scatter_(1, num_accepted_tokens.unsqueeze(1), last_token_ids.unsqueeze(1))
    return VerifyResult(num_accepted_tokens, output)
