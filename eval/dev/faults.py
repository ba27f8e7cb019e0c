"""Faults on purpose: stages of an engine's step that fail from the nth time on that a given request takes part."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from enum import Enum

from specdec.engine.core import EngineCore
from specdec.errors import RowsError
from specdec.kernels.decisions import Drafts
from specdec.request.text import OutputText
from specdec.step.scheduler import ScheduledSequence
from specdec.step.verify import TargetResult


class InjectedError(RuntimeError):
    """A fault on purpose."""


class Fault(Enum):
    """Where a fault strikes. All but the last two fail a step without saying for whom."""

    BEFORE_DRAFT = "before draft"
    """Before the draft stage."""
    AFTER_DRAFT = "after draft"
    """After the MTP layer has run."""
    AFTER_FORWARD = "after forward"
    """After the target's forward."""
    ROW = "row"
    """After the target's forward, as a fault of one request's row."""
    COMMIT = "commit"
    """During the commit of one request."""


class FaultPlan:
    """Makes stages fail as planned, by taking their places in the core.

    failed: the ids of the requests that are at fault in the steps that failed so far.
    """

    def __init__(self, core: EngineCore) -> None:
        self.failed: set[str] = set()
        self._planned: dict[str, tuple[Fault, int]] = {}
        self._due: dict[Fault, tuple[int, ScheduledSequence]] = {}  # this step's
        self._drafter, self._verifier = core.drafter, core.verifier
        core.drafter = core.verifier = self

    def plan(self, request_id: str, fault: Fault, nth: int) -> None:
        """Plans a fault from the request's nth step on, if it lives so long."""
        self._planned[request_id] = (fault, nth)

    def draft(self, scheduled: Seq[ScheduledSequence]) -> Drafts:
        """Drafts, and raises InjectedError where a fault is due."""
        self._due = {}
        for row, s in enumerate(scheduled):
            fault, steps_left = self._planned.get(s.sequence.request_id, (None, 0))
            if fault is not None and steps_left > 1:
                self._planned[s.sequence.request_id] = fault, steps_left - 1
            elif fault is not None:
                self._due[fault] = row, s
        self._strike(Fault.BEFORE_DRAFT, scheduled)
        result = self._drafter.draft(scheduled)
        self._strike(Fault.AFTER_DRAFT, scheduled)
        return result

    def verify(self, scheduled: Seq[ScheduledSequence], drafts: Drafts) -> TargetResult:
        """Verifies, and raises InjectedError, or RowsError with it, where a fault is due."""
        result = self._verifier.verify(scheduled, drafts)
        self._strike(Fault.AFTER_FORWARD, scheduled)
        if Fault.ROW in self._due:
            row, s = self._due.pop(Fault.ROW)
            self.failed.add(s.sequence.request_id)
            raise RowsError([row], InjectedError("row"))
        if Fault.COMMIT in self._due and self._due[Fault.COMMIT][1].samples:
            _, s = self._due.pop(Fault.COMMIT)
            self.failed.add(s.sequence.request_id)
            s.sequence.output = _BrokenText(s.sequence.output)
        return result

    def _strike(self, fault: Fault, scheduled: Seq[ScheduledSequence]) -> None:
        if fault in self._due:
            if len(scheduled) == 1:
                self.failed.add(scheduled[0].sequence.request_id)
            raise InjectedError(fault.value)


class _BrokenText(OutputText):
    """A request's text as it is so far, which takes no further token."""

    def __init__(self, text: OutputText) -> None:
        vars(self).update(vars(text))

    def push(self, token_id: int) -> bool:
        raise InjectedError("commit")

    def flush(self) -> bool:
        raise InjectedError("commit")
