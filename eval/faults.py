"""Faults on purpose: stages of an engine's step that fail when a given request takes part for the nth time."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from enum import Enum

from specdec.core import EngineCore
from specdec.draft import DraftResult
from specdec.errors import RowsError
from specdec.scheduler import ScheduledSequence
from specdec.verify import TargetResult


class InjectedError(RuntimeError):
    pass


class Fault(Enum):
    """Where it strikes: before the draft stage, in it, after the target's forward; of a stage that knows the row it
    failed for; in the commit of one request. All but the last two fail every request of their step."""

    BEFORE_DRAFT = "before draft"
    AFTER_DRAFT = "after draft"
    AFTER_FORWARD = "after forward"
    ROW = "row"
    COMMIT = "commit"


class FaultPlan:
    """Puts itself around the core's stages. failed: the ids of the requests that the faults so far struck."""

    def __init__(self, core: EngineCore) -> None:
        self.failed: set[str] = set()
        self._planned: dict[str, tuple[Fault, int]] = {}
        self._due: dict[Fault, tuple[int, ScheduledSequence]] = {}  # this step's
        self._drafter, self._verify = core.drafter, core.verifier.verify
        core.drafter = self
        core.verifier.verify = self.verify  # type: ignore[method-assign]

    def plan(self, request_id: str, fault: Fault, nth: int) -> None:
        """At the request's nth step, if it lives so long."""
        self._planned[request_id] = (fault, nth)

    def draft(self, scheduled: Seq[ScheduledSequence]) -> DraftResult:
        self._due = {}
        for row, s in enumerate(scheduled):
            planned = self._planned.pop(s.sequence.request_id, None)
            if planned is not None and planned[1] > 1:
                self._planned[s.sequence.request_id] = (planned[0], planned[1] - 1)
            elif planned is not None:
                self._due[planned[0]] = (row, s)
        self._strike(Fault.BEFORE_DRAFT, scheduled)
        result = self._drafter.draft(scheduled)
        self._strike(Fault.AFTER_DRAFT, scheduled)
        return result

    def verify(self, scheduled: Seq[ScheduledSequence], drafts: DraftResult) -> TargetResult:
        result = self._verify(scheduled, drafts)
        self._strike(Fault.AFTER_FORWARD, scheduled)
        if Fault.ROW in self._due:
            row, s = self._due.pop(Fault.ROW)
            self.failed.add(s.sequence.request_id)
            raise RowsError([row], InjectedError("row"))
        if Fault.COMMIT in self._due and self._due[Fault.COMMIT][1].samples:
            _, s = self._due.pop(Fault.COMMIT)
            self.failed.add(s.sequence.request_id)
            s.sequence.output.push = s.sequence.output.flush = _raise  # type: ignore[method-assign, assignment]
        return result

    def _strike(self, fault: Fault, scheduled: Seq[ScheduledSequence]) -> None:
        if self._due.pop(fault, None) is not None:
            self.failed.update(s.sequence.request_id for s in scheduled)
            raise InjectedError(fault.value)


def _raise(*_: object) -> bool:
    raise InjectedError("commit")
