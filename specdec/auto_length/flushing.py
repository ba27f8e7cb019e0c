"""Flushes: the MTP layer runs over pairs that wait for it though nothing is drafted, so that fewer are left to catch up
with."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

from specdec.auto_length.plan import StepPlan
from specdec.auto_length.savings import Savings
from specdec.cost import CostTable
from specdec.step.scheduler import ScheduledSequence

FLUSH_SHARE = 0.004  # share of the time that flushes may take
FLUSH_PAIRS = 64  # pairs of a sequence that wait before they are worth a call


class Flushing:
    """Adds waiting pairs to plans, for as long as there is time saved up for it."""

    def __init__(self) -> None:
        self.savings = Savings(FLUSH_SHARE, 0.0)

    def add(self, plan: StepPlan, scheduled: Seq[ScheduledSequence], table: CostTable) -> None:
        """Adds to the plan the waiting pairs of each sequence that has many and drafts nothing, as far as savings go.

        plan: of the step; `flushed` and `load` of it are changed.
        scheduled: all sequences of the step.
        table: the costs to predict by.
        """
        extend_s, num_pairs = table.extend_s, plan.load.num_pairs
        if extend_s(num_pairs + FLUSH_PAIRS) - extend_s(num_pairs) > self.savings.saved_s:
            return
        for b, k in zip(plan.members, plan.lengths):
            waiting = scheduled[b].sequence.num_pending_pairs
            if k or b in plan.extra or waiting < FLUSH_PAIRS or scheduled[b].extends_mtp_with(0):
                continue
            if self.savings.spend(extend_s(num_pairs + waiting) - extend_s(num_pairs)):
                num_pairs += waiting
                plan.flushed.append(b)
        if plan.flushed:
            plan.load = replace(plan.load, num_pairs=num_pairs)
