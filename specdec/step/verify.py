"""Stage 3, verify: one target forward over new tokens and drafts, then each request's rule.

Shapes: B scheduled sequences, R rows that decide tokens (one per draft and one more of each sequence that samples),
V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from torch import Tensor

from specdec.errors import ModelError, RowsError
from specdec.kernels.interface import (
    BLOCK_VERIFICATION,
    EXACT_MATCH,
    TOKEN_REJECTION,
    HiddenRows,
    Verification,
    Verified,
)
from specdec.model.glm4_moe import Glm4MoeForCausalLM
from specdec.request.logprobs import DecidedRows, TokenLogprobs, token_logprobs
from specdec.request.sequence import Rule, Sequence
from specdec.step.batch import Extend, ForwardBatch, build_batch
from specdec.step.draft import DraftResult, check_finite
from specdec.step.sampling import row_sampling, target_stream
from specdec.step.scheduler import ScheduledSequence

RULES: dict[Rule, int] = {
    "greedy": EXACT_MATCH,
    "coupled": EXACT_MATCH,
    "token": TOKEN_REJECTION,
    "block": BLOCK_VERIFICATION,
}


@dataclass(frozen=True, slots=True)
class TargetResult:
    """output_token_ids[b]: what sequence b emits, its accepted drafts and one token more; empty where it does not
    sample. logprobs[b]: of these tokens, where the request asks for them. hidden[b]: the target's hidden states of its
    rows, the new tokens and then the drafts. draft_token_ids[b]: what was verified, known by now wherever it was made,
    and perhaps less than there were rows for.
    """

    output_token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs]]
    hidden: list[HiddenRows]  # [B] of num_new_tokens + num_draft_tokens
    draft_token_ids: list[list[int]] = field(default_factory=list)


class TargetVerifier:
    def __init__(self, target: Glm4MoeForCausalLM, kv_cache: Tensor, page_size: int) -> None:
        self.target, self.kv_cache, self.page_size = target, kv_cache, page_size

    def verify(self, scheduled: Seq[ScheduledSequence], drafts: DraftResult) -> TargetResult:
        batch = self._build_batch(scheduled, drafts)
        deciding = [b for b, s in enumerate(scheduled) if s.samples]
        sequences = [scheduled[b].sequence for b in deciding]
        rules = [s.rule for s in sequences]
        verification = Verification(
            first_rows=[batch.row_starts[b] + scheduled[b].num_new_tokens - 1 for b in deciding],
            drafts=[drafts.draft_token_ids[b] for b in deciding],
            rules=[RULES[rule] for rule in rules],
            rows=row_sampling(sequences, [target_stream(rule) for rule in rules]),
            edits=[s.logit_edits for s in sequences],
            prob_rows=[drafts.prob_rows[b] for b in deciding],
            draft_probs=drafts.draft_probs,
            drafts_on_device=drafts.on_device,
            draft_rows=[] if drafts.on_device is None else [drafts.device_rows[b] for b in deciding],
            keep_logits=any(s.params.logprobs is not None for s in sequences),
        )
        verified = self.target.verify(batch.input_ids, batch.metadata, self.kv_cache, verification)
        output_token_ids: list[list[int]] = [[] for _ in scheduled]
        draft_token_ids = drafts.draft_token_ids
        if verified.draft_token_ids is not None:
            draft_token_ids = [[] for _ in scheduled]
            for b, draft_ids in zip(deciding, verified.draft_token_ids):
                draft_token_ids[b] = draft_ids
            check_finite(draft_token_ids)
        for b, token_ids in zip(deciding, verified.token_ids):
            output_token_ids[b] = token_ids
        broken = [b for b in deciding if output_token_ids[b][-1] < 0]
        if broken:
            raise RowsError(broken, ModelError.not_finite("the target"))
        logprobs: list[list[TokenLogprobs]] = [[] for _ in scheduled]
        if verification.keep_logits:
            for b, found in zip(deciding, _logprobs(sequences, verification, verified)):
                logprobs[b] = found
        spans = zip(batch.row_starts, scheduled, draft_token_ids)
        hidden = [HiddenRows(verified.hidden, first, s.num_new_tokens + len(row)) for first, s, row in spans]
        return TargetResult(output_token_ids, logprobs, hidden, draft_token_ids)

    def _build_batch(self, scheduled: Seq[ScheduledSequence], drafts: DraftResult) -> ForwardBatch:
        extends = []
        for s, draft_ids in zip(scheduled, drafts.draft_token_ids):
            start = s.sequence.num_computed_tokens
            new = s.sequence.token_ids[start : start + s.num_new_tokens]
            extends.append(Extend(new + draft_ids, start, s.sequence.page_table))
        return build_batch(extends, self.page_size)


def _logprobs(sequences: list[Sequence], verification: Verification, verified: Verified) -> list[list[TokenLogprobs]]:
    """Of each sequence's tokens; none where it does not ask."""
    assert verified.raw is not None
    assert verified.processed is not None
    rows = [len(drafts) + 1 for drafts in verification.drafts]
    laws = zip(verified.raw.split_with_sizes(rows), verified.processed.split_with_sizes(rows))
    requests = []
    for sequence, token_ids, (raw, processed) in zip(sequences, verified.token_ids, laws):
        params = sequence.params
        asked = [] if params.logprobs is None else token_ids
        emitted = processed[: len(asked)] / (params.temperature or 1.0)
        requests.append(DecidedRows(asked, raw, emitted, params.logprobs or 0))
    return token_logprobs(requests)
