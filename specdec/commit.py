"""Stage 4, commit: what verification decided becomes part of each sequence. The only stage that changes one."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from specdec.kernels.interface import HiddenRows
from specdec.scheduler import ScheduledSequence
from specdec.sequence import FinishReason, Sequence
from specdec.verify import TargetResult


def commit(scheduled: Seq[ScheduledSequence], result: TargetResult) -> None:
    """Applies one step's result to its sequences."""
    results = zip(scheduled, result.output_token_ids, result.logprobs, result.hidden, strict=True)
    for s, token_ids, logprobs, hidden in results:
        num_accepted = max(0, len(token_ids) - 1)
        _commit_cache_rows(s.sequence, s.num_new_tokens + num_accepted, hidden)
        if token_ids:
            s.sequence.stats.record_verification(hidden.num_rows - s.num_new_tokens, num_accepted)
            s.sequence.logprobs += logprobs
            _commit_tokens(s.sequence, token_ids)


def abort(sequence: Sequence) -> None:
    """Ends a request that has not finished; what it generated so far stays."""
    sequence.finish_reason = "abort"
    sequence.output.flush()
    sequence.pending_hidden = None


def _commit_cache_rows(sequence: Sequence, num_rows: int, hidden: HiddenRows) -> None:
    """Keeps the KV rows of new and accepted tokens; rejected drafts' rows are overwritten later."""
    sequence.num_computed_tokens += num_rows
    if sequence.speculates:
        # Draft ran the MTP layer over what was pending; these hidden states are for the next extend.
        pending = sequence.pending_hidden
        sequence.num_mtp_tokens += 0 if pending is None else pending.num_rows
        sequence.pending_hidden = HiddenRows(hidden.hidden, hidden.first, num_rows)


def _commit_tokens(sequence: Sequence, token_ids: list[int]) -> None:
    """Appends tokens up to the one that ends the request, which may lie inside the accepted run."""
    before = len(sequence.token_ids)
    for token_id in token_ids:
        sequence.token_ids.append(token_id)
        if sequence.edits is not None:
            sequence.edits.advance(token_id)
        sequence.finish_reason = _finish_reason(sequence, token_id)
        if sequence.finished:
            if sequence.output.flush():
                sequence.finish_reason = "stop"
            sequence.pending_hidden = None
            break
    del sequence.logprobs[sequence.num_output_tokens :]
    sequence.stats.record_tokens(len(sequence.token_ids) - before)


def _finish_reason(sequence: Sequence, token_id: int) -> FinishReason | None:
    if token_id in sequence.end_token_ids:
        if sequence.params.include_stop_str_in_output:
            sequence.output.push(token_id)
        return "stop"
    if sequence.output.push(token_id):
        return "stop"
    return "length" if len(sequence.token_ids) >= sequence.max_total_tokens else None
