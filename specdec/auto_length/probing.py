"""Probes: drafts that are not expected to pay, made to see whether acceptance has risen."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

from specdec.auto_length.plan import RequestState, StepPlan
from specdec.auto_length.savings import Savings
from specdec.cost import CostTable
from specdec.step.scheduler import ScheduledSequence

PROBE_SHARE = 0.006  # share of the time that probes may take
PROBE_INTERVAL = 64  # steps between two probes of a sequence, unless the last one was accepted
DEBT_STEPS = 3.0  # plain steps that may be borrowed to follow up an accepted probe: it pays at some depth alone


class Probing:
    """Adds probes to plans, for as long as there is time saved up for it.

    Drafts of probes that are accepted earn the time that their tokens were worth. So probing goes on, and deeper, for
    as long as it pays.
    """

    def __init__(self) -> None:
        self.savings = Savings(PROBE_SHARE, math.inf)

    def add(self, plan: StepPlan, scheduled: Seq[ScheduledSequence], table: CostTable, step: int) -> None:
        """Adds to the plan the probes that are due, as far as savings go; those come first that need few pairs to run.

        plan: of the step; `extra` and `load` of it are changed.
        scheduled: all sequences of the step.
        table: the costs to predict by.
        step: the number of this step, counted by the engine.
        """
        due = _due(plan, scheduled, step)
        plan_s = plan.load.seconds(table) if due else 0.0
        for b, k, request in due:
            extra = min(request.probe_length, scheduled[b].num_draft_tokens - k)
            load = plan.load.with_probe(scheduled[b], k, extra)
            load_s = load.seconds(table)
            if not self.savings.spend(load_s - plan_s, request.hot * DEBT_STEPS * plan.plain_s):
                return
            plan.load, plan_s, plan.extra[b] = load, load_s, extra
            request.probed_at, request.hot = step, False

    def record(self, plan: StepPlan, output_token_ids: Seq[Seq[int]], table: CostTable) -> None:
        """Credits the time that accepted drafts of probes were worth to the savings, for further probes.

        plan: of the step that has ended.
        output_token_ids: output_token_ids[b] is what sequence b emitted.
        table: the costs that tokens are valued by.
        """
        token_s = plan.load.seconds(table) / sum(map(len, output_token_ids))
        for b, request, k in zip(plan.members, plan.requests, plan.lengths):
            if b in plan.extra:
                gained = max(0, len(output_token_ids[b]) - 1 - k)
                request.hot = gained == plan.extra[b]
                request.probe_length = 2 * plan.extra[b] if request.hot else 1
                self.savings.earn(gained * token_s)


def _due(plan: StepPlan, scheduled: Seq[ScheduledSequence], step: int) -> list[tuple[int, int, RequestState]]:
    """Returns place b, draft length and state of the members that may be probed, the cheapest first."""
    found = [
        (0 if k else scheduled[b].sequence.num_pending_pairs, b, k, request)
        for b, request, k in zip(plan.members, plan.requests, plan.lengths)
        if k < scheduled[b].num_draft_tokens
        and (request.hot or request.probed_at is None or step - request.probed_at >= PROBE_INTERVAL)
    ]
    return [entry[1:] for entry in sorted(found, key=lambda entry: entry[0])]
