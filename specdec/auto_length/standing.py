"""The decision that stands: deciding takes longer than a small model's plain step can bear."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

from specdec.step.scheduler import ScheduledSequence

DECISION_SHARE = 0.01  # of the time, for deciding
NOBODY = -1  # in place of a sequence that may not draft: its first token is not there, or its last one is next


class Standing:
    """Draft lengths that were decided once and stand for some steps: whom they are for, and for how long."""

    def __init__(self) -> None:
        self.lengths: list[int | None] = []  # by place; None: as scheduled
        self.decided_at = 0  # number of a step, as the following
        self._changed_at = self._wake_at = 0
        self._drafting: list[int] = []  # arrivals, or NOBODY, by place
        self._rests_until_s = -math.inf

    def fits(self, scheduled: Seq[ScheduledSequence], step: int) -> bool:
        """Returns whether it is for these sequences: the same ones may draft, and all decode. From now on it is."""
        drafting = [s.sequence.arrival if s.num_draft_tokens else NOBODY for s in scheduled]
        if drafting == self._drafting and sum(s.num_new_tokens for s in scheduled) == len(scheduled):
            return True
        self._drafting, self._changed_at = drafting, step
        return False

    def decide(self, step: int, num_steps: int) -> None:
        """Stands from now on, for `num_steps` steps at most; for fewer soon after requests have come or gone."""
        self.decided_at = step
        self._wake_at = step + min(num_steps, 1 + (step - self._changed_at) // 2)

    def is_due(self, step: int) -> bool:
        """Returns whether these sequences' lengths are to be decided anew."""
        return step >= self._wake_at

    def rest(self, started_s: float, ended_s: float) -> None:
        """Rests for so long that deciding, from started_s to ended_s, takes DECISION_SHARE of the time."""
        self._rests_until_s = started_s + (ended_s - started_s) / DECISION_SHARE

    def rests(self, now_s: float) -> bool:
        """Returns whether the lengths stand yet, whoever comes or goes, for what deciding has cost."""
        return now_s < self._rests_until_s

    def forget(self) -> None:
        """Stands for nobody, since costs are others now."""
        self._drafting = []
