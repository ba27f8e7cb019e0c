"""Stage 3, verify: one target forward over new tokens and drafts, then each request's rule.

Shapes: B scheduled sequences, K draft tokens (the most of any), R = K+1 rows per sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specdec.batch import Extend, ForwardBatch, build_batch
from specdec.draft import DraftResult
from specdec.errors import ModelError
from specdec.model.glm4_moe import Glm4MoeForCausalLM
from specdec.rng import Stream, uniforms
from specdec.sampling import transform_logits
from specdec.scheduler import ScheduledSequence
from specdec.verify import PAD, VerifyResult, verify_choices, verify_token


@dataclass(frozen=True)
class TargetResult:
    """`verified` covers the scheduled sequences that sample (the others are all `PAD`); `hidden[b]` holds
    the target's hidden states of sequence b's rows: its new tokens, then its drafts."""

    verified: VerifyResult
    hidden: list[Tensor]  # [B] of [num_new_tokens + num_draft_tokens, H]


class TargetVerifier:
    def __init__(self, target: Glm4MoeForCausalLM, kv_cache: Tensor, page_size: int) -> None:
        self.target, self.kv_cache, self.page_size = target, kv_cache, page_size

    def verify(self, scheduled: Seq[ScheduledSequence], drafts: DraftResult) -> TargetResult:
        batch = self._build_batch(scheduled, drafts)
        hidden = self.target(batch.input_ids, batch.positions, batch.metadata, self.kv_cache)
        verified = self._apply_rules(scheduled, drafts, hidden, batch.row_starts)
        return TargetResult(verified, list(hidden.split(batch.metadata.query_lens)))

    def _build_batch(self, scheduled: Seq[ScheduledSequence], drafts: DraftResult) -> ForwardBatch:
        extends = []
        for s, draft_ids in zip(scheduled, drafts.draft_token_ids.tolist()):
            start = s.sequence.num_computed_tokens
            new = s.sequence.token_ids[start : start + s.num_new_tokens]
            extends.append(Extend(new + draft_ids[: s.num_draft_tokens], start, s.sequence.page_table))
        return build_batch(extends, self.page_size, self.kv_cache.device)

    def _apply_rules(
        self, scheduled: Seq[ScheduledSequence], drafts: DraftResult, hidden: Tensor, row_starts: list[int]
    ) -> VerifyResult:
        num_rows = drafts.draft_token_ids.shape[1] + 1
        accepted = torch.zeros(len(scheduled), dtype=torch.int64, device=hidden.device)
        output = torch.full((len(scheduled), num_rows), PAD, dtype=torch.int64, device=hidden.device)
        for name, rule in RULES.items():
            chosen = [b for b, s in enumerate(scheduled) if s.samples and rule_of(s) == name]
            if not chosen:
                continue
            counts = [scheduled[b].num_draft_tokens for b in chosen]
            firsts = [row_starts[b] + scheduled[b].num_new_tokens - 1 for b in chosen]
            deciding = DecidingRows.of(self.target, hidden, firsts, counts, num_rows)
            result = rule(deciding, [scheduled[b] for b in chosen], _select(drafts, chosen))
            accepted[chosen], output[chosen] = result.num_accepted_tokens, result.output_token_ids
        return VerifyResult(accepted, output)


@dataclass(frozen=True)
class DecidingRows:
    """The rows that decide tokens: of each sequence the last new token's and its drafts', k+1 in all.

    hidden [N, H] has them without padding; `padding` [B * (K+1)] leads from there to K+1 rows per sequence, the
    last repeated.
    """

    target: Glm4MoeForCausalLM
    hidden: Tensor
    padding: list[int]
    num_rows: int

    @classmethod
    def of(
        cls, target: Glm4MoeForCausalLM, hidden: Tensor, firsts: list[int], counts: list[int], num_rows: int
    ) -> DecidingRows:
        rows: list[int] = []
        padding: list[int] = []
        for first, count in zip(firsts, counts):
            padding += [len(rows) + min(r, count) for r in range(num_rows)]
            rows += range(first, first + count + 1)
        return cls(target, hidden if len(rows) == len(hidden) else hidden[rows], padding, num_rows)

    def choices(self) -> Tensor:
        """The target's argmax [B, K+1]."""
        chosen = self.target.choose_tokens(self.hidden)
        _require_finite(bool((chosen >= 0).all()))
        return self._pad(chosen)

    def logits(self) -> Tensor:
        """[B, K+1, V]"""
        logits = self.target.compute_logits(self.hidden)
        _require_finite(bool(torch.isfinite(logits).all()))
        return self._pad(logits)

    def _pad(self, rows: Tensor) -> Tensor:
        padded = rows if len(self.padding) == len(rows) else rows[self.padding]
        return padded.unflatten(0, (-1, self.num_rows))


def _require_finite(finite: bool) -> None:
    if not finite:
        raise ModelError("the target's logits are not finite: its weights are broken, or its dtype overflows")


def rule_of(scheduled: ScheduledSequence) -> str:
    """Temperature 0 is greedy whatever the request's rule."""
    sequence = scheduled.sequence
    return "greedy" if sequence.params.greedy else sequence.speculation.verification


def _select(drafts: DraftResult, chosen: list[int]) -> DraftResult:
    probs = None if drafts.draft_probs is None else drafts.draft_probs[chosen]
    return DraftResult(drafts.draft_token_ids[chosen], drafts.num_draft_tokens[chosen], probs)


def _greedy(rows: DecidingRows, scheduled: Seq[ScheduledSequence], drafts: DraftResult) -> VerifyResult:
    return verify_choices(rows.choices(), drafts.draft_token_ids, drafts.num_draft_tokens)


def _token(rows: DecidingRows, scheduled: Seq[ScheduledSequence], drafts: DraftResult) -> VerifyResult:
    params = [s.sequence.params for s in scheduled for _ in range(rows.num_rows)]
    logits = rows.logits()
    target_probs = transform_logits(logits.flatten(0, 1), params).unflatten(0, (-1, rows.num_rows))
    starts = np.array([[len(s.sequence.token_ids)] for s in scheduled])
    seeds = np.array([[s.sequence.seed] for s in scheduled], np.uint64)
    positions = starts + np.arange(rows.num_rows)
    accept = uniforms(seeds, Stream.ACCEPT, positions[:, :-1], starts)
    last = uniforms(seeds, Stream.RESIDUAL, positions, starts)
    return verify_token(
        target_probs,
        drafts.draft_token_ids,
        drafts.draft_probs,
        drafts.num_draft_tokens,
        torch.from_numpy(accept).to(logits.device),
        torch.from_numpy(last).to(logits.device),
    )


RULES: dict[str, Callable[[DecidingRows, Seq[ScheduledSequence], DraftResult], VerifyResult]] = {
    "greedy": _greedy,
    "token": _token,
}
