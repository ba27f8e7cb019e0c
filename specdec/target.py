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
from specdec.sequence import Sequence
from specdec.verify import match_choices, verify_token


@dataclass(frozen=True)
class TargetResult:
    """output_token_ids[b]: what sequence b emits, its accepted drafts and one token more; empty where it does not
    sample. hidden[b]: the target's hidden states of its rows, the new tokens and then the drafts."""

    output_token_ids: list[list[int]]
    hidden: Seq[Tensor]  # [B] of [num_new_tokens + num_draft_tokens, H]


class TargetVerifier:
    def __init__(self, target: Glm4MoeForCausalLM, kv_cache: Tensor, page_size: int) -> None:
        self.target, self.kv_cache, self.page_size = target, kv_cache, page_size

    def verify(self, scheduled: Seq[ScheduledSequence], drafts: DraftResult) -> TargetResult:
        batch = self._build_batch(scheduled, drafts)
        hidden = self.target.forward(batch.input_ids, batch.positions, batch.metadata, self.kv_cache)
        output = self._apply_rules(scheduled, drafts, hidden, batch.row_starts)
        return TargetResult(output, hidden.split_with_sizes(batch.metadata.query_lens))

    def _build_batch(self, scheduled: Seq[ScheduledSequence], drafts: DraftResult) -> ForwardBatch:
        extends = []
        for s, draft_ids in zip(scheduled, drafts.draft_token_ids):
            start = s.sequence.num_computed_tokens
            new = s.sequence.token_ids[start : start + s.num_new_tokens]
            extends.append(Extend(new + draft_ids, start, s.sequence.page_table))
        return build_batch(extends, self.page_size, self.kv_cache.device)

    def _apply_rules(
        self, scheduled: Seq[ScheduledSequence], drafts: DraftResult, hidden: Tensor, row_starts: list[int]
    ) -> list[list[int]]:
        output: list[list[int]] = [[] for _ in scheduled]
        for name, rule in RULES.items():
            chosen = [b for b, s in enumerate(scheduled) if s.samples and rule_of(s) == name]
            if chosen:
                last_new = [row_starts[b] + scheduled[b].num_new_tokens - 1 for b in chosen]
                rows = DecidingRows(self.target, hidden, last_new, [drafts.draft_token_ids[b] for b in chosen])
                probs = None if drafts.draft_probs is None else drafts.draft_probs[chosen]
                for b, token_ids in zip(chosen, rule(rows, [scheduled[b].sequence for b in chosen], probs)):
                    output[b] = token_ids
        return output


@dataclass(frozen=True)
class DecidingRows:
    """The rows that decide tokens: of each sequence its last new token's and its drafts'.

    hidden [T, H] of the whole forward; last_new [B]: each sequence's last new token's row, which its drafts'
    rows follow.
    """

    target: Glm4MoeForCausalLM
    hidden: Tensor
    last_new: list[int]
    draft_token_ids: list[list[int]]

    def choices(self) -> list[list[int]]:
        """The target's argmax for each sequence's rows, [B] of [k+1]."""
        chosen = self.target.choose_tokens(self._deciding()).tolist()
        _require_finite(min(chosen) >= 0)
        rows = iter(chosen)
        return [[next(rows) for _ in range(len(drafts) + 1)] for drafts in self.draft_token_ids]

    def logits(self) -> Tensor:
        """[B, K+1, V], each sequence's last row repeated where it has fewer than K drafts."""
        logits = self.target.compute_logits(self._deciding())
        _require_finite(bool(torch.isfinite(logits).all()))
        most = max(map(len, self.draft_token_ids))
        padded, first = [], 0
        for drafts in self.draft_token_ids:
            padded += [first + min(r, len(drafts)) for r in range(most + 1)]
            first += len(drafts) + 1
        return logits[padded].unflatten(0, (-1, most + 1))

    def padded_drafts(self) -> tuple[Tensor, Tensor]:
        """-> draft_token_ids [B, K], padded with 0, and num_draft_tokens [B]."""
        counts = [len(drafts) for drafts in self.draft_token_ids]
        padded = [drafts + [0] * (max(counts) - len(drafts)) for drafts in self.draft_token_ids]
        device = self.hidden.device
        ids = torch.tensor(padded, dtype=torch.int64, device=device).view(len(counts), max(counts))
        return ids, torch.tensor(counts, dtype=torch.int64, device=device)

    def _deciding(self) -> Tensor:
        rows: list[int] = []
        for first, drafts in zip(self.last_new, self.draft_token_ids):
            rows += range(first, first + len(drafts) + 1)
        return self.hidden if len(rows) == self.hidden.shape[0] else self.hidden[rows]


def _require_finite(finite: bool) -> None:
    if not finite:
        raise ModelError("the target's logits are not finite: its weights are broken, or its dtype overflows")


def rule_of(scheduled: ScheduledSequence) -> str:
    """Temperature 0 is greedy whatever the request's rule."""
    sequence = scheduled.sequence
    return "greedy" if sequence.params.greedy else sequence.speculation.verification


def _greedy(rows: DecidingRows, sequences: Seq[Sequence], draft_probs: Tensor | None) -> list[list[int]]:
    return [match_choices(choices, drafts) for choices, drafts in zip(rows.choices(), rows.draft_token_ids)]


def _token(rows: DecidingRows, sequences: Seq[Sequence], draft_probs: Tensor | None) -> list[list[int]]:
    logits = rows.logits()
    num_rows = logits.shape[1]
    params = [s.params for s in sequences for _ in range(num_rows)]
    target_probs = transform_logits(logits.flatten(0, 1), params).unflatten(0, (-1, num_rows))
    starts = np.array([[len(s.token_ids)] for s in sequences])
    seeds = np.array([[s.seed] for s in sequences], np.uint64)
    positions = starts + np.arange(num_rows)
    accept = uniforms(seeds, Stream.ACCEPT, positions[:, :-1], starts)
    last = uniforms(seeds, Stream.RESIDUAL, positions, starts)
    draft_token_ids, num_draft_tokens = rows.padded_drafts()
    result = verify_token(
        target_probs,
        draft_token_ids,
        None if draft_probs is None else draft_probs[:, : num_rows - 1],
        num_draft_tokens,
        torch.from_numpy(accept).to(logits.device),
        torch.from_numpy(last).to(logits.device),
    )
    counts = result.num_accepted_tokens.tolist()
    return [ids[: n + 1] for n, ids in zip(counts, result.output_token_ids.tolist())]


Rule = Callable[[DecidingRows, Seq[Sequence], Tensor | None], list[list[int]]]
RULES: dict[str, Rule] = {"greedy": _greedy, "token": _token}
