"""How many tokens each sequence drafts in a step. No torch here; docs/draft_length.md has the definitions.

A controller is asked before any draft of the step exists and learns the outcome after its commit, so a decision is a
function of the past: that is what keeps the rejection rules exact (algorithms: non-anticipation).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from specdec.auto_length.flushing import Flushing
from specdec.auto_length.lengths import Candidate, StepBase, best_lengths
from specdec.auto_length.past import Past
from specdec.auto_length.plan import RequestState, StepPlan, members_of, plan_step
from specdec.auto_length.probing import Probing
from specdec.auto_length.standing import Standing
from specdec.auto_length.tables import MeasuredTable
from specdec.auto_length.timing import Timer
from specdec.cost import CostTable
from specdec.step.draft_length import DraftLengthStats
from specdec.step.scheduler import ScheduledSequence

KEPT_STEPS, KEPT_PLAIN_STEPS = 8, 16  # steps for which a decision stands, with drafts and without
TIMED_STEPS = 16  # one step of so many is timed, while a decision stands
RESUME_STEPS = 64  # steps in which drafting must earn what catching up with waiting pairs costs


class AutoDraftLength:
    """Chooses draft lengths of "auto" requests by cost and acceptance; those of others stay as they are.

    What is known of costs (`MeasuredTable`, `Timer`) and of requests (`Past`) gives the best lengths; `Probing` and
    `Flushing` add to them what does not pay at once; the result stands for some steps (`Standing`).
    """

    def __init__(
        self,
        measure: Callable[[CostTable | None], CostTable],
        clock: Callable[[], float] = time.perf_counter,
        *,
        follow_clock: bool = True,
    ) -> None:
        """Starts without a table; `prepare` measures it.

        measure: returns a table; it is called before the first decision, and again with a table that has proved wrong.
        clock: returns seconds.
        follow_clock: whether the times of recent steps correct the table. Otherwise what is decided is a function of
            the table and of past acceptances alone, and the clock serves the statistics.
        """
        self.stats = DraftLengthStats()
        self._clock, self._follow_clock = clock, follow_clock
        self._table = MeasuredTable(measure)
        self._timer = Timer(clock, self.stats)
        self._past, self._standing = Past(), Standing()
        self._probing, self._flushing = Probing(), Flushing()
        self._step = 0  # number of the last step
        self._plan: StepPlan | None = None  # of the last step; None where nobody left a length to the controller

    def snapshot(self) -> DraftLengthStats:
        """Returns a copy of the statistics, which no later step changes."""
        stats = self.stats
        return DraftLengthStats(
            list(stats.chosen), stats.num_probes, stats.num_flushes, stats.between_s, stats.times.snapshot()
        )

    def prepare(self) -> None:
        """Measures a table where there is none, or where the one in use has proved wrong."""
        wrong = self._follow_clock and self._table.is_wrong(self.stats.times)
        if self._table.current is None or wrong:
            self._table.measure()
            self._standing.forget()
            self.stats.times.forget()

    @property
    def table(self) -> CostTable:
        """The cost table in use. There is one after `prepare`."""
        assert self._table.current is not None, "an automatic request came unannounced"
        return self._table.current

    def plain_step_s(self, rows: int) -> float | None:
        """Returns the seconds of a step of so many sequences without drafts; None before costs are known."""
        table = self._table.current
        return None if table is None else self.stats.times.plain.factor * table.plain_s(rows)

    def choose(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """Lowers the numbers of drafts of "auto" requests, by the decision that stands or a new one."""
        if self._table.current is None:  # nobody asks for it
            return scheduled
        self._step += 1
        self._timer.skip()
        if self._standing.fits(scheduled, self._step):
            return scheduled if self._plan is None else self._choose_again(scheduled, self._plan)
        return self._carry_over(scheduled) if self._rests else self._decide_and_rest(scheduled)

    def record(self, scheduled: Seq[ScheduledSequence], drafts: Seq[Seq[int]], output_token_ids: Seq[Seq[int]]) -> None:
        """Learns what became of the step that `choose` was asked about, see `DraftLength.record`."""
        plan = self._plan
        if plan is None:
            return
        self._timer.stop(plan, self.table)
        if plan.load.num_pairs:
            self._past.record(plan, drafts, output_token_ids)
        if plan.extra:
            self._probing.record(plan, output_token_ids, self.table)
            plan.extra.clear()  # the plan may stand for further steps, without them

    @property
    def _rests(self) -> bool:
        """Whether deciding again would take more than DECISION_SHARE of the time; until it would not, the last decision
        is kept, even for other requests."""
        return self._follow_clock and self._standing.rests(self._clock())

    def _choose_again(self, scheduled: list[ScheduledSequence], plan: StepPlan) -> list[ScheduledSequence]:
        """Chooses for the sequences of the last step."""
        if self._standing.is_due(self._step) and not self._rests:
            self._timer.record_between(plan.plain_s)
            return self._decide_and_rest(scheduled)
        if (self._step - self._standing.decided_at) % TIMED_STEPS == 1:  # a deciding step is slower than others
            self._time(scheduled, plan)
        return self._chosen(scheduled, self._standing.lengths)

    def _time(self, scheduled: list[ScheduledSequence], plan: StepPlan) -> None:
        """Times this step, all of whose sequences decode, and none of which is probed or flushed."""
        lengths = [min(k, scheduled[b].num_draft_tokens) for b, k in zip(plan.members, plan.lengths)]
        self._plan = plan_step(self.table, scheduled, plan.members, plan.requests, lengths)
        self._timer.start()

    def _carry_over(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """Applies the last decision to a changed set of sequences; newcomers get the most common length."""
        members = members_of(scheduled)
        if not members:
            self._plan = None
            return scheduled
        requests = self._known(scheduled, members)
        self._plan = plan_step(self.table, scheduled, members, requests, self._past.carried_over(requests))
        self._keep(scheduled, self._plan)
        return self._chosen(scheduled, self._standing.lengths)

    def _decide_and_rest(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        started_s = self._clock()
        chosen = self._decide(scheduled)
        self._standing.rest(started_s, self._clock())
        return chosen

    def _decide(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        members = members_of(scheduled)
        if not members:
            self._plan = None
            return scheduled
        requests = self._known(scheduled, members)
        lengths = best_lengths(self.table, self._base(scheduled), self._candidates(scheduled, members, requests))
        plan = self._plan = plan_step(self.table, scheduled, members, requests, lengths)
        self._add_extras(scheduled, plan)
        self._keep(scheduled, plan)
        most = 1 if plan.extra else KEPT_STEPS if any(plan.lengths) else KEPT_PLAIN_STEPS
        self._standing.decide(self._step, most)
        lengths_now = list(self._standing.lengths)
        for b, extra in plan.extra.items():
            lengths_now[b] = (lengths_now[b] or 0) + extra
        for b in plan.flushed:
            scheduled[b].flushes = True
        return self._chosen(scheduled, lengths_now)

    def _known(self, scheduled: Seq[ScheduledSequence], members: Seq[int]) -> list[RequestState]:
        return self._past.known([scheduled[b].sequence.arrival for b in members], self._step)

    def _base(self, scheduled: Seq[ScheduledSequence]) -> StepBase:
        """Returns the step without the drafts that are to be chosen."""
        return StepBase(
            num_sequences=len(scheduled),
            num_rows=sum(s.num_new_tokens for s in scheduled),
            others=[s.num_draft_tokens for s in scheduled if s.samples and not s.sequence.speculation.automatic],
            between_s=self.stats.between_s if self._follow_clock else 0.0,
            drafting_factor=self.stats.times.drafting_factor if self._follow_clock else 1.0,
        )

    def _candidates(
        self, scheduled: Seq[ScheduledSequence], members: Seq[int], requests: Seq[RequestState]
    ) -> list[Candidate]:
        survivals = self._past.survivals(requests, self._step)
        pair_s = self.table.pair_s / RESUME_STEPS
        return [
            Candidate(of_request[: s.num_draft_tokens], pair_s * _num_waiting(s), not s.sequence.params.greedy)
            for s, of_request in zip((scheduled[b] for b in members), survivals)
        ]

    def _add_extras(self, scheduled: Seq[ScheduledSequence], plan: StepPlan) -> None:
        """Adds probes and flushes to the plan, out of what was saved since the last decision."""
        step_s, num_steps = plan.load.seconds(self.table), self._step - self._standing.decided_at
        self._probing.savings.save(step_s, num_steps)
        self._flushing.savings.save(step_s, num_steps)
        self._probing.add(plan, scheduled, self.table, self._step)
        self._flushing.add(plan, scheduled, self.table)
        self.stats.num_probes += len(plan.extra)
        self.stats.num_flushes += len(plan.flushed)

    def _keep(self, scheduled: Seq[ScheduledSequence], plan: StepPlan) -> None:
        """Makes the plan's lengths the decision that stands."""
        lengths: list[int | None] = [None] * len(scheduled)
        for b, k in zip(plan.members, plan.lengths):
            lengths[b] = k
        self._standing.lengths = lengths
        self._past.keep(plan.requests, plan.lengths, [scheduled[b].num_draft_tokens for b in plan.members])

    def _chosen(self, scheduled: list[ScheduledSequence], lengths: Seq[int | None]) -> list[ScheduledSequence]:
        """Lowers the sequences' numbers of drafts to lengths[b]; None leaves them as they are."""
        counts = self.stats.chosen
        for s, k in zip(scheduled, lengths):
            if k is not None:
                s.num_draft_tokens = min(k, s.num_draft_tokens)
                counts[s.num_draft_tokens] += 1
        return scheduled


def _num_waiting(scheduled: ScheduledSequence) -> int:
    """Returns how many pairs would wait if nothing was drafted."""
    return 0 if scheduled.extends_mtp_with(0) else scheduled.sequence.num_pending_pairs
