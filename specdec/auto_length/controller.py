"""How many tokens each sequence drafts in a step. No torch here; docs/draft_length.md has the definitions.

A controller is asked before any draft of the step exists and learns the outcome after its commit, so a decision is a
function of the past: that is what keeps the rejection rules exact (algorithms: non-anticipation).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

from specdec.auto_length.acceptance import EngineAcceptance, RequestAcceptance
from specdec.auto_length.plan import NO_DRAFTS, Request, StepPlan, best_lengths
from specdec.cost import CostTable
from specdec.step.draft_length import DraftLengthStats
from specdec.step.scheduler import ScheduledSequence

PROBE_SHARE = 0.006  # of the time, for drafts that are not expected to pay
FLUSH_SHARE = 0.004  # of the time, for pairs that wait though nothing is drafted
SAVING_STEPS = 256  # of which both may save up their shares
DEBT_STEPS = 3.0  # plain steps that may be borrowed to follow up an accepted probe: it pays at some depth alone
BETWEEN_DECISIONS = 16.0  # over which the time between steps is averaged
KEPT_STEPS, KEPT_PLAIN_STEPS = 8, 16  # for which a decision stands, with drafts and without
DECISION_SHARE = 0.01  # of the time, for deciding
TIMED_STEPS = 16  # one of so many is timed, while a decision stands
MIN_TIMED_STEPS, MIN_FACTOR, MAX_TABLES = 16, 0.7, 3  # when a table is measured again
RESUME_STEPS = 64  # over which drafting must earn what catching up with waiting pairs costs
PROBE_INTERVAL = 64  # steps between two probes of a sequence, unless the last one was accepted
FLUSH_PAIRS = 64  # that wait before they are worth a call
NOBODY = -1  # in place of a sequence that may not draft: its first token is not there, or its last one is next


class AutoDraftLength:
    """Draft lengths of "auto" requests by cost and acceptance; those of others stay as they are.

    measure: gives a table, before the first decision; and again, given the table that has proved wrong. clock:
    seconds. follow_clock: steps that draft are weighed against plain ones as they were measured lately; otherwise what
    is decided is a function of the table and of past acceptances alone, and the clock serves the statistics.

    Deciding takes longer than a small model's plain step can bear. So a decision stands for some steps in which the
    same requests decode, and for so long that it is a small share of the time even if others come.
    """

    def __init__(
        self,
        measure: Callable[[CostTable | None], CostTable],
        clock: Callable[[], float] = time.perf_counter,
        *,
        follow_clock: bool = True,
    ) -> None:
        self.stats = DraftLengthStats()
        self._measure, self._clock, self._follow_clock = measure, clock, follow_clock
        self._table: CostTable | None = None
        self._num_tables = 0
        self._engine = EngineAcceptance()
        self._requests: dict[int, Request] = {}  # by arrival, as below
        self._step = self._decided_at = self._changed_at = self._wake_at = 0
        self._scheduled: list[int] = []  # who may draft by the decision that stands
        self._lengths: list[int | None] = []  # of them; None: as scheduled
        self._usual_length = 0
        self._probe_s = self._flush_s = 0.0  # saved up
        self._plan: StepPlan | None = None
        self._rests_until_s = -math.inf
        self._started_s: float | None = None  # of a step that is timed
        self._ended_s: float | None = None  # of the last step
        self._copied = (0, 0.0), self.stats.times.copy()  # when they were so many steps

    def snapshot(self) -> DraftLengthStats:
        stats, times = self.stats, self.stats.times
        state = times.num_steps, times.measured_s
        if self._copied[0] != state:  # few steps are timed, and each of them has a snapshot
            self._copied = state, times.copy()
        return DraftLengthStats(
            list(stats.chosen), stats.num_probes, stats.num_flushes, stats.between_s, self._copied[1]
        )

    def prepare(self) -> None:
        """A table is wrong where steps have turned out much faster than it says: it was measured on a busy machine."""
        plain = self.stats.times.plain
        wrong = plain.num_steps >= MIN_TIMED_STEPS and plain.factor < MIN_FACTOR and self._num_tables < MAX_TABLES
        if self._table is None or (wrong and self._follow_clock):
            self._table = self._measure(self._table)
            self._num_tables += 1
            self._scheduled = []
            self.stats.times.forget()

    @property
    def table(self) -> CostTable:
        assert self._table is not None, "an automatic request came unannounced"
        return self._table

    def plain_step_s(self, rows: int) -> float | None:
        table = self._table
        return None if table is None else self.stats.times.plain.factor * table.plain_s(rows)

    def choose(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        if self._table is None:  # nobody asks for it
            return scheduled
        drafting = [s.sequence.arrival if s.num_draft_tokens else NOBODY for s in scheduled]
        self._step, self._started_s = self._step + 1, None
        if drafting == self._scheduled and sum(s.num_new_tokens for s in scheduled) == len(scheduled):
            if self._plan is None:
                return scheduled
            if self._step < self._wake_at or self._rests:
                if (self._step - self._decided_at) % TIMED_STEPS == 1:  # a deciding step is slower than others
                    self._time(scheduled, self._plan)
                return self._chosen(scheduled, self._lengths)
            self._record_between()
        else:
            self._scheduled, self._changed_at = drafting, self._step
            if self._rests:
                return self._carry_over(scheduled)
        started_s = self._clock()
        chosen = self._decide(scheduled)
        self._rests_until_s = started_s + (self._clock() - started_s) / DECISION_SHARE
        return chosen

    def record(self, scheduled: Seq[ScheduledSequence], drafts: Seq[Seq[int]], output_token_ids: Seq[Seq[int]]) -> None:
        plan = self._plan
        if plan is None:
            return
        self._ended_s = self._clock()
        if self._started_s is not None:
            self.stats.times.record(
                plan.seconds(self.table), self._ended_s - self._started_s, drafts=plan.num_pairs > 0
            )
        if not plan.num_pairs:
            return
        for b, request in zip(plan.members, plan.requests):
            num_drafted, num_accepted = len(drafts[b]), len(output_token_ids[b]) - 1
            if num_drafted:
                self._engine.counts.record(num_drafted, num_accepted)
                request.acceptance.counts.record(num_drafted, num_accepted)
        if plan.extra:
            self._record_probes(plan, output_token_ids)

    @property
    def _rests(self) -> bool:
        """The last decision has cost so much that it stands yet, whoever comes or goes."""
        return self._follow_clock and self._clock() < self._rests_until_s

    def _carry_over(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """The last decision for other sequences: those that it did not know draft as most of the others do."""
        members = _members(scheduled)
        if not members:
            self._plan = None
            return scheduled
        requests = self._known(scheduled, members)
        lengths = [self._usual_length if request.length is None else request.length for request in requests]
        self._plan = self._planned(scheduled, members, lengths)
        self._keep(scheduled, members, lengths)
        return self._chosen(scheduled, self._lengths)

    def _keep(self, scheduled: list[ScheduledSequence], members: list[int], lengths: list[int]) -> None:
        self._lengths = [None] * len(scheduled)
        for b, k, request in zip(members, lengths, self._requests.values()):
            self._lengths[b] = k
            if scheduled[b].num_draft_tokens > 0:  # a choice there was
                request.length = k
        known = [request.length for request in self._requests.values() if request.length is not None]
        if known:
            self._usual_length = statistics.mode(known)

    def _known(self, scheduled: list[ScheduledSequence], members: list[int]) -> list[Request]:
        """Of these sequences; the others are forgotten."""
        before, arrivals = self._requests, [scheduled[b].sequence.arrival for b in members]
        self._requests = {
            arrival: before.get(arrival) or Request(RequestAcceptance(self._step), self._step - PROBE_INTERVAL)
            for arrival in arrivals
        }
        return list(self._requests.values())

    def _time(self, scheduled: list[ScheduledSequence], plan: StepPlan) -> None:
        """This step is a sample for the statistics: all its sequences decode, and none is probed or flushed."""
        lengths = [min(k, scheduled[b].num_draft_tokens) for b, k in zip(plan.members, plan.lengths)]
        self._plan = self._planned(scheduled, plan.members, lengths)
        self._started_s = self._clock()

    def _record_between(self) -> None:
        """Scheduling and what the front door does; a wait for a slow reader counts as one step at most."""
        if self._ended_s is None or self._plan is None:  # the step before failed
            return
        between_s = min(self._clock() - self._ended_s, self._plan.plain_s)
        self.stats.between_s += (between_s - self.stats.between_s) / BETWEEN_DECISIONS

    def _record_probes(self, plan: StepPlan, output_token_ids: Seq[Seq[int]]) -> None:
        """What they gained is saved up for more of them."""
        token_s = plan.seconds(self.table) / sum(map(len, output_token_ids))
        for b, request, k in zip(plan.members, plan.requests, plan.lengths):
            if b in plan.extra:
                gained = max(0, len(output_token_ids[b]) - 1 - k)
                request.hot = gained == plan.extra[b]
                request.probe_length = 2 * plan.extra[b] if request.hot else 1
                self._probe_s += gained * token_s
        plan.extra.clear()  # the plan may stand for further steps, without them

    def _decide(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        members = _members(scheduled)
        if not members:
            self._plan = None
            return scheduled
        table = self.table
        plan = self._plan = self._planned(scheduled, members, self._best(scheduled, members))
        self._save(plan.seconds(table))
        self._probe(scheduled, plan)
        self._flush(scheduled, plan)
        self._keep(scheduled, members, plan.lengths)
        most = 1 if plan.extra else KEPT_STEPS if any(plan.lengths) else KEPT_PLAIN_STEPS
        self._decided_at = self._step
        self._wake_at = self._step + min(most, 1 + (self._step - self._changed_at) // 2)
        lengths = list(self._lengths)
        for b, extra in plan.extra.items():
            lengths[b] = (lengths[b] or 0) + extra
        for b in plan.flushed:
            scheduled[b].flushes = True
        return self._chosen(scheduled, lengths)

    def _chosen(self, scheduled: list[ScheduledSequence], lengths: list[int | None]) -> list[ScheduledSequence]:
        counts = self.stats.chosen
        for s, k in zip(scheduled, lengths):
            if k is not None:
                s.num_draft_tokens = min(k, s.num_draft_tokens)
                counts[s.num_draft_tokens] += 1
        return scheduled

    def _best(self, scheduled: list[ScheduledSequence], members: list[int]) -> list[int]:
        """The draft lengths with which a step is expected to be the fastest."""
        requests = self._known(scheduled, members)
        rates, weight = self._engine.rates(), self._engine.prior_weight(r.acceptance for r in requests)
        return best_lengths(
            self.table,
            [
                request.acceptance.survivals(rates, weight, self._step)[: scheduled[b].num_draft_tokens]
                for b, request in zip(members, requests)
            ],
            num_sequences=len(scheduled),
            num_rows=sum(s.num_new_tokens for s in scheduled),
            others=[s.num_draft_tokens for s in scheduled if s.samples and not s.sequence.speculation.automatic],
            catch_up_s=[self._catch_up_s(scheduled[b]) / RESUME_STEPS for b in members],
            sampled=[not scheduled[b].sequence.params.greedy for b in members],
            drafting_factor=self.stats.times.drafting_factor if self._follow_clock else 1.0,
            between_s=self.stats.between_s if self._follow_clock else 0.0,
        )

    def _catch_up_s(self, scheduled: ScheduledSequence) -> float:
        """What the pairs cost that would wait if nothing was drafted."""
        return 0.0 if scheduled.extends_mtp_with(0) else scheduled.sequence.num_pending_pairs * self.table.pair_s

    def _planned(self, scheduled: list[ScheduledSequence], members: list[int], lengths: list[int]) -> StepPlan:
        num_rows = sum(s.num_new_tokens for s in scheduled)
        num_sampled = sum(s.samples and not s.sequence.params.greedy for s in scheduled)
        requests = list(self._requests.values())
        plan = StepPlan(members, requests, lengths, len(scheduled), num_rows, 0, num_sampled, list(NO_DRAFTS))
        plan.plain_s = plan.seconds(self.table)
        of_members = dict(zip(members, lengths))
        for b, s in enumerate(scheduled):
            k = of_members.get(b, s.num_draft_tokens)
            if s.extends_mtp_with(k):
                plan.add(k, s.sequence.num_pending_pairs, not s.sequence.params.greedy)
        return plan

    def _save(self, step_s: float) -> None:
        """Shares of the time since the last decision."""
        most = PROBE_SHARE * step_s * SAVING_STEPS
        share = PROBE_SHARE * step_s * (self._step - self._decided_at)
        self._probe_s = min(most, self._probe_s + share) if self._decided_at else most
        most = FLUSH_SHARE * step_s * SAVING_STEPS
        self._flush_s = min(most, self._flush_s + FLUSH_SHARE * step_s * (self._step - self._decided_at))

    def _probe(self, scheduled: list[ScheduledSequence], plan: StepPlan) -> None:
        """Drafts beyond those that pay, of the sequences whose last probe is long ago or was accepted. What is accepted
        earns what tokens are worth, so probing goes on, and deeper, for as long as it pays."""
        long_ago = self._step - PROBE_INTERVAL
        due = [
            (0 if k else scheduled[b].sequence.num_pending_pairs, b, k, request)
            for b, request, k in zip(plan.members, plan.requests, plan.lengths)
            if (request.hot or request.probed_at <= long_ago) and k < scheduled[b].num_draft_tokens
        ]
        if not due:
            return
        plan_s = plan.seconds(self.table)
        for num_pairs, b, k, request in sorted(due, key=lambda entry: entry[0]):
            s, extra = scheduled[b], min(request.probe_length, scheduled[b].num_draft_tokens - k)
            probed = replace(plan, drafting=list(plan.drafting))
            probed.add(extra, num_pairs, not s.sequence.params.greedy, k)
            probed_s = probed.seconds(self.table)
            if probed_s - plan_s > self._probe_s + request.hot * DEBT_STEPS * plan.plain_s:
                return
            self._probe_s -= probed_s - plan_s
            plan_s = probed_s
            plan.num_rows, plan.num_pairs, plan.num_sampled = probed.num_rows, probed.num_pairs, probed.num_sampled
            plan.drafting, plan.extra[b] = probed.drafting, extra
            request.probed_at, request.hot = self._step, False
            self.stats.num_probes += 1

    def _flush(self, scheduled: list[ScheduledSequence], plan: StepPlan) -> None:
        """Waiting pairs, in batches, where the MTP layer can catch up for next to nothing."""
        extend_s, before = self.table.extend_s, plan.num_pairs
        if extend_s(before + FLUSH_PAIRS) - extend_s(before) > self._flush_s:
            return
        for b, k in zip(plan.members, plan.lengths):
            num_pairs = scheduled[b].sequence.num_pending_pairs
            if k or b in plan.extra or num_pairs < FLUSH_PAIRS or scheduled[b].extends_mtp_with(0):
                continue
            cost = extend_s(plan.num_pairs + num_pairs) - extend_s(plan.num_pairs)
            if cost <= self._flush_s:
                self._flush_s -= cost
                plan.num_pairs += num_pairs
                plan.flushed.append(b)
                self.stats.num_flushes += 1


def _members(scheduled: list[ScheduledSequence]) -> list[int]:
    """Numbers b of those that sample in this step and leave their draft length to the controller."""
    return [b for b, s in enumerate(scheduled) if s.sequence.speculation.automatic and s.samples]
