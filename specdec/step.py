"""One engine step, whole: schedule -> draft -> verify -> commit."""

from __future__ import annotations

from typing import NamedTuple

from specdec.commit import commit
from specdec.draft import Drafter, DraftResult
from specdec.scheduler import ScheduledSequence, Scheduler
from specdec.verify import TargetResult, TargetVerifier


def step(scheduler: Scheduler, drafter: Drafter, verifier: TargetVerifier) -> StepResult:
    """Advances every scheduled sequence by a prefill chunk or a verification.

    A sequence contributes a chunk of its prompt, or its last token plus up to K drafts, to one ragged
    target forward; each of those that decode ends the step with 1 to K+1 new tokens.
    """
    scheduled = scheduler.schedule()
    drafts = drafter.draft(scheduled)
    result = verifier.verify(scheduled, drafts)
    commit(scheduled, result)
    scheduler.remove_finished()
    return StepResult(scheduled, drafts, result)


class Decision(NamedTuple):
    """A step's decision about one request. start: the number of tokens before those that it decided."""

    request_id: str
    start: int
    draft_token_ids: list[int]
    output_token_ids: list[int]  # as the rule decided: what ends the request may lie inside


class StepResult(NamedTuple):
    """What a step did, after its commit."""

    scheduled: list[ScheduledSequence]
    drafts: DraftResult
    result: TargetResult

    def decisions(self) -> list[Decision]:
        """Of every sequence that decided tokens."""
        rows = zip(self.scheduled, self.result.draft_token_ids, self.result.output_token_ids)
        return [
            Decision(s.sequence.request_id, s.sequence.num_computed_tokens - len(output) + 1, drafts, output)
            for s, drafts, output in rows
            if output
        ]
