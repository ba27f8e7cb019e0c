"""Stage 3, verify: one target forward over new tokens and drafts, then each request's rule.

Shapes: B scheduled sequences, R rows that decide tokens (one per draft and one more of each sequence that samples),
V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from specdec.errors import ModelError, RowsError
from specdec.kernels.data import HiddenRows
from specdec.kernels.decisions import (
    BLOCK_VERIFICATION,
    EXACT_MATCH,
    NOT_FINITE,
    TOKEN_REJECTION,
    Drafts,
    Verified,
    VerifyBatch,
)
from specdec.model.glm4_moe import Glm4MoeForCausalLM
from specdec.request.logprobs import DecidedRows, TokenLogprobs, token_logprobs
from specdec.request.sequence import Rule, Sequence
from specdec.step.batch import Extend, ForwardBatch, build_batch
from specdec.step.sampling import row_sampling, target_stream
from specdec.step.scheduler import ScheduledSequence

Item = TypeVar("Item")

RULES: dict[Rule, int] = {
    "greedy": EXACT_MATCH,
    "coupled": EXACT_MATCH,
    "token": TOKEN_REJECTION,
    "block": BLOCK_VERIFICATION,
}


@dataclass(frozen=True, slots=True)
class TargetResult:
    """What verification decided about each of B scheduled sequences."""

    output_token_ids: list[list[int]]
    """[B]: what the sequence emits, its accepted drafts and one token more; empty where it does not sample."""
    draft_token_ids: list[list[int]]
    """[B]: the drafts that were verified, known by now wherever they were made, perhaps fewer than rows for them."""
    hidden: list[HiddenRows]
    """[B]: the target's hidden states of the sequence's rows, the new tokens and then the drafts."""
    logprobs: list[list[TokenLogprobs]]
    """[B]: log-probabilities, one entry per emitted token; empty where the request does not ask for them."""


class TargetVerifier:
    """Verifies with the target model."""

    def __init__(self, target: Glm4MoeForCausalLM, kv_cache: Tensor, page_size: int) -> None:
        self.target, self.kv_cache, self.page_size = target, kv_cache, page_size

    def verify(self, scheduled: Seq[ScheduledSequence], drafts: Drafts) -> TargetResult:
        """Runs one forward over the new tokens and drafts of all B sequences, and decides by each one's rule. Raises
        RowsError of the sequences whose logits, or whose draft model's, are not finite."""
        # 1) What the forward runs over, and what is to be decided after it: by those that sample in this step.
        batch = self._build_batch(scheduled, drafts)
        deciding = [b for b, s in enumerate(scheduled) if s.samples]
        sequences = [scheduled[b].sequence for b in deciding]
        asked = VerifyBatch(
            first_rows=[batch.row_starts[b] + scheduled[b].num_new_tokens - 1 for b in deciding],
            drafts=drafts if len(deciding) == len(scheduled) else drafts.select(deciding),
            rules=[RULES[s.rule] for s in sequences],
            rows=row_sampling(sequences, [target_stream(s.rule) for s in sequences]),
            edits=[s.logit_edits for s in sequences],
            keep_logits=any(s.params.logprobs is not None for s in sequences),
        )
        # 2) The backend's one call.
        verified = self.target.verify(batch.input_ids, batch.metadata, self.kv_cache, asked)
        _check_finite(deciding, verified)
        # 3) Back from those that decide to all that were scheduled.
        num = len(scheduled)
        draft_token_ids = _spread(deciding, verified.draft_token_ids, num)
        spans = zip(batch.row_starts, scheduled, draft_token_ids)
        return TargetResult(
            output_token_ids=_spread(deciding, verified.token_ids, num),
            draft_token_ids=draft_token_ids,
            hidden=[HiddenRows(verified.hidden, first, s.num_new_tokens + len(row)) for first, s, row in spans],
            logprobs=_spread(deciding, _logprobs(sequences, asked, verified), num),
        )

    def _build_batch(self, scheduled: Seq[ScheduledSequence], drafts: Drafts) -> ForwardBatch:
        """Packs every sequence's new tokens, and after them room for its drafts, which the backend fills in."""
        extends = []
        for s, count in zip(scheduled, drafts.counts):
            start = s.sequence.num_computed_tokens
            new = s.sequence.token_ids[start : start + s.num_new_tokens]
            extends.append(Extend(new + [0] * count, start, s.sequence.page_table))
        return build_batch(extends, self.page_size)


def _spread(places: list[int], values: list[list[Item]], num: int) -> list[list[Item]]:
    """Returns num lists: those of `values` in their places, the others empty."""
    if len(places) == num:
        return values
    spread: list[list[Item]] = [[] for _ in range(num)]
    for b, value in zip(places, values):
        spread[b] = value
    return spread


def _check_finite(deciding: list[int], verified: Verified) -> None:
    """Raises RowsError of the sequences, by their places in the step, that were decided from logits that are not
    finite.
    """
    for whose, broken in (
        ("the MTP layer", [b for b, ids in zip(deciding, verified.draft_token_ids) if NOT_FINITE in ids]),
        ("the target", [b for b, ids in zip(deciding, verified.token_ids) if ids[-1] < 0]),
    ):
        if broken:
            raise RowsError(broken, ModelError.not_finite(whose))


def _logprobs(sequences: list[Sequence], asked: VerifyBatch, verified: Verified) -> list[list[TokenLogprobs]]:
    """Returns the log-probabilities of each deciding sequence's tokens; none where it does not ask."""
    if verified.raw is None or verified.processed is None:
        return [[] for _ in sequences]
    rows = [count + 1 for count in asked.drafts.counts]
    logits = zip(verified.raw.split_with_sizes(rows), verified.processed.split_with_sizes(rows))
    requests = []
    for sequence, token_ids, (raw, processed) in zip(sequences, verified.token_ids, logits):
        params = sequence.params
        wanted = [] if params.logprobs is None else token_ids
        emitted = processed[: len(wanted)] / (params.temperature or 1.0)
        requests.append(DecidedRows(wanted, raw, emitted, params.logprobs or 0))
    return token_logprobs(requests)
