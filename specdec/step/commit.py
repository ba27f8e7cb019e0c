"""Stage 4, commit: what verification decided becomes part of each sequence.

It is the only stage that changes a sequence, the sequence's statistics included. What it added is returned as a
`CommitRecord`, for the engine's statistics.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq

import torch

from specdec.errors import RowsError
from specdec.kernels.data import HiddenRows
from specdec.request.logprobs import TokenLogprobs
from specdec.request.sequence import FinishReason, Sequence
from specdec.request.stats import CommitRecord
from specdec.step.scheduler import ScheduledSequence
from specdec.step.verify import TargetResult

MAX_PIECES = 256  # pieces of pending hidden states, before they are copied into one tensor
MAX_SHARED_ROWS = 64  # a tensor of up to so many rows is kept alive for any number of them


class CommitError(RowsError):
    """The commit failed for one sequence: those before it are complete, those after it as they were."""

    def __init__(self, row: int, error: Exception, records: list[CommitRecord | None]) -> None:
        """Describes the failure.

        row: place of the sequence in the step.
        error: what failed.
        records: what `commit` would have returned, None from the sequence that failed on.
        """
        super().__init__([row], error)
        self.records = records


def commit(scheduled: Seq[ScheduledSequence], result: TargetResult) -> list[CommitRecord | None]:
    """Applies one step's result to its sequences, one after the other.

    Returns what it added to each of them; None for a sequence of which the step decided no token. Raises CommitError.
    """
    now = time.perf_counter()
    records: list[CommitRecord | None] = []
    results = zip(scheduled, result.output_token_ids, result.logprobs, result.hidden, strict=True)
    for b, (s, token_ids, logprobs, hidden) in enumerate(results):
        try:
            records.append(_commit_sequence(now, s, token_ids, logprobs, hidden))
        except Exception as error:
            raise CommitError(b, error, records + [None] * (len(scheduled) - b)) from error
    return records


def _commit_sequence(
    now: float, s: ScheduledSequence, token_ids: list[int], logprobs: list[TokenLogprobs], hidden: HiddenRows
) -> CommitRecord | None:
    num_accepted = len(token_ids) - 1 if token_ids else 0
    _commit_cache_rows(s, s.num_new_tokens + num_accepted, hidden)
    if not token_ids:
        return None
    sequence = s.sequence
    sequence.logprobs += logprobs
    num_tokens = _commit_tokens(sequence, token_ids)
    return sequence.stats.record_commit(now, hidden.num_rows - s.num_new_tokens, num_accepted, num_tokens)


def _commit_cache_rows(s: ScheduledSequence, num_rows: int, hidden: HiddenRows) -> None:
    """Keeps the KV rows of new and accepted tokens; rejected drafts' rows are overwritten later."""
    sequence = s.sequence
    if s.extends_mtp:  # draft has run the MTP layer over what was pending
        sequence.num_mtp_tokens = sequence.num_computed_tokens
        sequence.pending_hidden = []
    sequence.num_computed_tokens += num_rows
    if sequence.uses_mtp:
        rows = HiddenRows(hidden.hidden, hidden.first, num_rows)
        if sequence.speculation.automatic:
            _queue(sequence.pending_hidden, rows)
        else:
            sequence.pending_hidden = [rows]


def _queue(pending: list[HiddenRows], rows: HiddenRows) -> None:
    """Appends hidden states that wait for the MTP layer, copying them if they would keep a much larger tensor alive."""
    size = rows.hidden.shape[0]
    if size > MAX_SHARED_ROWS and size > 4 * rows.num_rows:
        rows = HiddenRows(rows.tensor().clone(), 0, rows.num_rows)
    pending.append(rows)
    if len(pending) >= MAX_PIECES:
        joined = torch.cat([piece.tensor() for piece in pending])
        pending[:] = [HiddenRows(joined, 0, len(joined))]


def _commit_tokens(sequence: Sequence, token_ids: list[int]) -> int:
    """Appends tokens up to the one that ends the request, which may lie inside the accepted run; returns how many."""
    committed, output, edits = sequence.token_ids, sequence.output, sequence.edits
    before = len(committed)
    for token_id in token_ids:
        committed.append(token_id)
        if edits is not None:
            edits.advance(token_id)
        if token_id in sequence.end_token_ids:
            if sequence.params.include_stop_str_in_output:
                output.push(token_id)
            reason: FinishReason = "stop"
        elif output.push(token_id):
            reason = "stop"
        elif len(committed) >= sequence.max_total_tokens:
            reason = "length"
        else:
            continue
        sequence.end(reason)
        break
    if sequence.logprobs:
        del sequence.logprobs[sequence.num_output_tokens :]
    return len(committed) - before
