"""Stage 3, verify: one target forward over new tokens and drafts, then each request's rule.

Shapes: B scheduled sequences, R rows that decide tokens (one per draft and one more of each sequence that samples),
V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from specdec.batch import Extend, ForwardBatch, build_batch
from specdec.draft import DraftResult
from specdec.edits import LogitRow, edit_logits_
from specdec.errors import ModelError
from specdec.kernels.interface import RowSampling
from specdec.logprobs import TokenLogprobs, token_logprobs
from specdec.model.glm4_moe import Glm4MoeForCausalLM
from specdec.sampling import SampledRows, row_sampling, target_stream
from specdec.scheduler import ScheduledSequence
from specdec.sequence import Rule, Sequence
from specdec.verify import Proposal, match_choices, verify_by_rejection

REJECTION_RULES = ("block", "token")


@dataclass(frozen=True)
class TargetResult:
    """output_token_ids[b]: what sequence b emits, its accepted drafts and one token more; empty where it does not
    sample. logprobs[b]: of these tokens, where the request asks for them. hidden[b]: the target's hidden states of its
    rows, the new tokens and then the drafts."""

    output_token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs]]
    hidden: Seq[Tensor]  # [B] of [num_new_tokens + num_draft_tokens, H]


@dataclass(frozen=True, slots=True)
class Deciding:
    """A sequence that samples. first_row: of the forward's rows, the one that decides its next token; its drafts' rows
    follow. edits: whether `specdec.edits` has anything to do."""

    index: int  # among the scheduled ones
    sequence: Sequence
    rule: Rule
    edits: bool
    drafts: list[int]
    prob_row: int
    first_row: int
    num_rows: int

    @property
    def needs_only_argmax(self) -> bool:
        return self.rule == "greedy" and not self.edits and self.sequence.params.logprobs is None


class TargetVerifier:
    def __init__(self, target: Glm4MoeForCausalLM, kv_cache: Tensor, page_size: int) -> None:
        self.target, self.kv_cache, self.page_size = target, kv_cache, page_size

    def verify(self, scheduled: Seq[ScheduledSequence], drafts: DraftResult) -> TargetResult:
        batch = self._build_batch(scheduled, drafts)
        hidden = self.target.forward(batch.input_ids, batch.positions, batch.metadata, self.kv_cache)
        deciding = _deciding(scheduled, drafts, batch.row_starts)
        result = TargetResult(
            [[] for _ in scheduled], [[] for _ in scheduled], hidden.split_with_sizes(batch.metadata.query_lens)
        )
        self._take_argmax([d for d in deciding if d.needs_only_argmax], hidden, result)
        self._apply_rules([d for d in deciding if not d.needs_only_argmax], hidden, drafts.draft_probs, result)
        return result

    def _build_batch(self, scheduled: Seq[ScheduledSequence], drafts: DraftResult) -> ForwardBatch:
        extends = []
        for s, draft_ids in zip(scheduled, drafts.draft_token_ids):
            start = s.sequence.num_computed_tokens
            new = s.sequence.token_ids[start : start + s.num_new_tokens]
            extends.append(Extend(new + draft_ids, start, s.sequence.page_table))
        return build_batch(extends, self.page_size, self.kv_cache.device)

    def _take_argmax(self, deciding: list[Deciding], hidden: Tensor, result: TargetResult) -> None:
        """Greedy verification without the logits."""
        if deciding:
            choices = iter(_finite(self.target.choose_tokens(_rows_of(deciding, hidden)).tolist()))
            for d in deciding:
                result.output_token_ids[d.index] = match_choices([next(choices) for _ in range(d.num_rows)], d.drafts)

    def _apply_rules(
        self, deciding: list[Deciding], hidden: Tensor, draft_probs: Tensor | None, result: TargetResult
    ) -> None:
        """Logits -> edits -> truncation -> rules."""
        if not deciding:
            return
        deciding = sorted(deciding, key=lambda d: d.rule in REJECTION_RULES)
        logits = self.target.compute_logits(_rows_of(deciding, hidden))  # [R, V]
        raw = logits.clone() if any(d.sequence.params.logprobs is not None for d in deciding) else logits
        if any(d.edits for d in deciding):
            edit_logits_(logits, [LogitRow(d.sequence, d.drafts[:i]) for d in deciding for i in range(d.num_rows)])
        sampling = row_sampling(
            SampledRows(d.sequence, target_stream(d.rule), len(d.sequence.token_ids), d.num_rows) for d in deciding
        )
        if sampling.cuts:
            self.target.kernels.truncate_(logits, sampling)
        for d, token_ids in zip(deciding, self._decide(deciding, logits, sampling, draft_probs)):
            result.output_token_ids[d.index] = _finite(token_ids)
        if raw is not logits:
            _add_logprobs(deciding, raw, logits, result)

    def _decide(
        self, deciding: list[Deciding], logits: Tensor, sampling: RowSampling, draft_probs: Tensor | None
    ) -> list[list[int]]:
        """The tokens that each sequence emits; those with exact-match rules come first."""
        kernels = self.target.kernels
        exact = [d for d in deciding if d.rule not in REJECTION_RULES]
        num_exact = sum(d.num_rows for d in exact)
        output = []
        if exact:
            rows = sampling if num_exact == len(logits) else sampling.select(list(range(num_exact)))
            choices = iter(kernels.choose(logits[:num_exact], rows).tolist())
            output += [match_choices([next(choices) for _ in range(d.num_rows)], d.drafts) for d in exact]
        if num_exact < len(logits):
            probs = kernels.softmax(logits[num_exact:], sampling.scales[num_exact:])
            proposals, first_row = [], 0
            for d in deciding[len(exact) :]:
                s, block = d.sequence, d.rule == "block"
                proposals.append(Proposal(d.drafts, first_row, d.prob_row, block, s.seed, len(s.token_ids)))
                first_row += d.num_rows
            output += verify_by_rejection(kernels, probs, draft_probs, proposals)
        return output


def _add_logprobs(deciding: list[Deciding], raw: Tensor, processed: Tensor, result: TargetResult) -> None:
    """raw, processed [R, V]: the logits before and after the requests' transforms, but for the temperature."""
    rows = [d.num_rows for d in deciding]
    for d, before, after in zip(deciding, raw.split_with_sizes(rows), processed.split_with_sizes(rows)):
        params, token_ids = d.sequence.params, result.output_token_ids[d.index]
        if params.logprobs is not None:
            after = after / (params.temperature or 1.0)
            result.logprobs[d.index] = token_logprobs(token_ids, before, after, params.logprobs)


def _deciding(scheduled: Seq[ScheduledSequence], drafts: DraftResult, row_starts: list[int]) -> list[Deciding]:
    return [
        Deciding(
            index=b,
            sequence=s.sequence,
            rule=s.sequence.rule,
            edits=s.sequence.edits_logits,
            drafts=drafts.draft_token_ids[b],
            prob_row=drafts.prob_rows[b],
            first_row=row_starts[b] + s.num_new_tokens - 1,
            num_rows=len(drafts.draft_token_ids[b]) + 1,
        )
        for b, s in enumerate(scheduled)
        if s.samples
    ]


def _rows_of(deciding: list[Deciding], hidden: Tensor) -> Tensor:
    """The rows that decide, in the order of `deciding`."""
    rows: list[int] = []
    for d in deciding:
        rows += range(d.first_row, d.first_row + d.num_rows)
    return hidden if rows == list(range(hidden.shape[0])) else hidden[rows]


def _finite(token_ids: list[int]) -> list[int]:
    if min(token_ids) < 0:
        raise ModelError("the target's logits are not finite: its weights are broken, or its dtype overflows")
    return token_ids
