"""Keeps a decision for some steps, since deciding in each would take longer than a small model's plain step can
bear."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

from specdec.step.scheduler import ScheduledSequence

DECISION_SHARE = 0.01  # share of the time that deciding may take
NOBODY = -1  # stands in place of a sequence that may not draft: its first token is not there, or its last one is next


class Standing:
    """Draft lengths that were decided once and stand for some steps: whom they are for, and for how long."""

    def __init__(self) -> None:
        self.lengths: list[int | None] = []  # by place; None: as scheduled
        self.decided_at = 0  # number of a step, as the following
        self._changed_at = self._wake_at = 0
        self._drafting: list[int] = []  # arrivals, or NOBODY, by place
        self._rests_until_s = -math.inf

    def fits(self, scheduled: Seq[ScheduledSequence], step: int) -> bool:
        """Returns whether the lengths are for these sequences: the same ones may draft, and all decode. Remembers these
        sequences where they are not, for the lengths that are decided next."""
        drafting = [s.sequence.arrival if s.num_draft_tokens else NOBODY for s in scheduled]
        if drafting == self._drafting and sum(s.num_new_tokens for s in scheduled) == len(scheduled):
            return True
        self._drafting, self._changed_at = drafting, step
        return False

    def decide(self, step: int, num_steps: int) -> None:
        """Starts the time for which lengths that were decided in step number `step` stand: at most `num_steps` steps,
        fewer soon after requests have come or gone."""
        self.decided_at = step
        self._wake_at = step + min(num_steps, 1 + (step - self._changed_at) // 2)

    def is_due(self, step: int) -> bool:
        """Returns whether the lengths have stood long enough, in step number `step`."""
        return step >= self._wake_at

    def rest(self, started_s: float, ended_s: float) -> None:
        """Rules out deciding for so long that the last decision, from started_s to ended_s, takes DECISION_SHARE of the
        time."""
        self._rests_until_s = started_s + (ended_s - started_s) / DECISION_SHARE

    def rests(self, now_s: float) -> bool:
        """Returns whether deciding is still ruled out, whoever comes or goes, because the last decision has cost so
        much.
        """
        return now_s < self._rests_until_s

    def forget(self) -> None:
        """Makes the lengths stand for nobody, because another cost table is in use."""
        self._drafting = []
