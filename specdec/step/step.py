"""One engine step, whole: schedule -> draft -> verify -> commit."""

from __future__ import annotations

from typing import NamedTuple

from specdec.errors import RowsError
from specdec.request.sequence import Sequence
from specdec.step.commit import commit
from specdec.step.draft import Drafter
from specdec.step.draft_length import DraftLength
from specdec.step.scheduler import ScheduledSequence, Scheduler
from specdec.step.verify import TargetResult, TargetVerifier


def step(scheduler: Scheduler, draft_length: DraftLength, drafter: Drafter, verifier: TargetVerifier) -> StepResult:
    """Advances every scheduled sequence by a prefill chunk or a verification.

    A sequence contributes a chunk of its prompt, or its last token plus up to K drafts, to one ragged
    target forward; each of those that decode ends the step with 1 to K+1 new tokens. Raises StepError.
    """
    scheduled = scheduler.schedule()
    try:
        scheduled = draft_length.choose(scheduled)
        drafts = drafter.draft(scheduled)
        result = verifier.verify(scheduled, drafts)
        commit(scheduled, result)
        draft_length.record(scheduled, result.draft_token_ids, result.output_token_ids)
    except Exception as error:
        raise StepError(scheduled, error) from error
    scheduler.remove_finished()
    return StepResult(scheduled, result)


class Decision(NamedTuple):
    """A step's decision about one request. start: the number of tokens before those that it decided."""

    request_id: str
    start: int
    draft_token_ids: list[int]
    output_token_ids: list[int]  # as the rule decided: what ends the request may lie inside


class StepResult(NamedTuple):
    """What a step did, after its commit."""

    scheduled: list[ScheduledSequence]
    result: TargetResult

    def decisions(self) -> list[Decision]:
        """Of every sequence that decided tokens."""
        rows = zip(self.scheduled, self.result.draft_token_ids, self.result.output_token_ids)
        return [
            Decision(s.sequence.request_id, s.sequence.num_computed_tokens - len(output) + 1, drafts, output)
            for s, drafts, output in rows
            if output
        ]


class StepError(Exception):
    """A stage failed with `error`. failed: the sequences that it failed for, all of them where the stage does not know.

    Only commit changes a sequence, and it knows for which one it failed. So the others are as they were before the
    step, or have committed it: drafts and the rows written for them are made again in their next step.
    """

    def __init__(self, scheduled: list[ScheduledSequence], error: Exception) -> None:
        super().__init__(str(error))
        self.scheduled = scheduled
        rows = error.rows if isinstance(error, RowsError) else range(len(scheduled))
        self.failed: list[Sequence] = [scheduled[b].sequence for b in rows]
        self.error = error.error if isinstance(error, RowsError) else error
