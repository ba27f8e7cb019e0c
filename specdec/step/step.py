"""One engine step, whole: schedule -> draft -> verify -> commit."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

from specdec.errors import RowsError
from specdec.kernels.decisions import Drafts
from specdec.request.sequence import Sequence
from specdec.request.stats import CommitRecord
from specdec.step.commit import CommitError, commit
from specdec.step.draft import DraftStage
from specdec.step.draft_length import DraftLength
from specdec.step.scheduler import ScheduledSequence, Scheduler
from specdec.step.verify import TargetResult


class Verifier(Protocol):
    """Decides tokens; may write KV rows of uncommitted tokens, must not change a sequence."""

    def verify(self, scheduled: Seq[ScheduledSequence], drafts: Drafts) -> TargetResult:
        """Decides what each scheduled sequence emits. Raises RowsError where it fails for some of them and knows for
        which."""
        ...


def step(scheduler: Scheduler, draft_length: DraftLength, drafter: DraftStage, verifier: Verifier) -> StepResult:
    """Advances every scheduled sequence by a prefill chunk or a verification.

    A sequence contributes a chunk of its prompt, or its last token plus up to K drafts, to one ragged
    target forward; each of those that decode ends the step with 1 to K+1 new tokens. Raises StepError.
    """
    result = advance(scheduler.schedule(), draft_length, drafter, verifier)
    scheduler.remove_finished()
    return result


def advance(
    scheduled: list[ScheduledSequence], draft_length: DraftLength, drafter: DraftStage, verifier: Verifier
) -> StepResult:
    """Runs the stages of a step for what is scheduled. Raises StepError."""
    records: list[CommitRecord | None] | None = None
    try:
        scheduled = draft_length.choose(scheduled)
        drafts = drafter.draft(scheduled)
        result = verifier.verify(scheduled, drafts)
        records = commit(scheduled, result)
        draft_length.record(scheduled, result.draft_token_ids, result.output_token_ids)
    except Exception as error:
        raise StepError(scheduled, records, error) from error
    return StepResult(scheduled, records, result)


def one_at_a_time(
    scheduled: list[ScheduledSequence], draft_length: DraftLength, drafter: DraftStage, verifier: Verifier
) -> list[StepResult | StepError]:
    """Advances each sequence of a step that failed without saying for whom by itself, so that it fails only for those
    at fault. No token depends on what else is in a step."""
    outcomes: list[StepResult | StepError] = []
    for s in scheduled:
        try:
            outcomes.append(advance([s], draft_length, drafter, verifier))
        except StepError as error:
            outcomes.append(error)
    return outcomes


class Decision(NamedTuple):
    """A step's decision about one request."""

    request_id: str
    """The request."""
    start: int
    """Number of its tokens before those that were decided."""
    draft_token_ids: list[int]
    """The drafts that were verified."""
    output_token_ids: list[int]
    """The tokens as the rule decided; what ends the request may lie inside."""


class StepResult(NamedTuple):
    """What a step did, after its commit."""

    scheduled: list[ScheduledSequence]
    """The sequences that took part."""
    records: list[CommitRecord | None]
    """What the step added to each of them; None where it decided no token."""
    result: TargetResult
    """What verification decided about each of them."""

    def decisions(self) -> list[Decision]:
        """Returns the decision about every sequence that decided tokens."""
        rows = zip(self.scheduled, self.result.draft_token_ids, self.result.output_token_ids)
        return [
            Decision(s.sequence.request_id, s.sequence.num_computed_tokens - len(output) + 1, drafts, output)
            for s, drafts, output in rows
            if output
        ]


class StepError(Exception):
    """A stage failed with `error`.

    scheduled: the sequences of the step.
    failed: those that it failed for, all of them where the stage does not know.
    knows_for_whom: whether only those can have been at fault; False where a smaller step may pass.
    records: what the step added to those that had committed when it failed, in the order of `scheduled`; None for the
        others.

    Only commit changes a sequence, and it knows for which one it failed. So the others are as they were before the
    step, or have committed it: drafts and the rows written for them are made again in their next step.
    """

    def __init__(
        self, scheduled: list[ScheduledSequence], records: list[CommitRecord | None] | None, error: Exception
    ) -> None:
        """Describes a failure. records: what `commit` returned; None where it had not been reached, or failed."""
        super().__init__(str(error))
        self.scheduled = scheduled
        self.knows_for_whom = len(scheduled) == 1 or isinstance(error, RowsError) or records is not None
        self.records = error.records if isinstance(error, CommitError) else records or [None] * len(scheduled)
        rows = error.rows if isinstance(error, RowsError) else range(len(scheduled))
        self.failed: list[Sequence] = [scheduled[b].sequence for b in rows]
        self.error = error.error if isinstance(error, RowsError) else error
