"""A step before it runs: who drafts how much, and what that costs by the table. No torch here."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from specdec.auto_length.acceptance import RequestAcceptance
from specdec.config import MAX_SPECULATIVE_TOKENS
from specdec.cost import CostTable
from specdec.step.scheduler import ScheduledSequence


@dataclass(slots=True)
class RequestState:
    """What the controller knows of one request."""

    acceptance: RequestAcceptance
    """How often its drafts were accepted."""
    probed_at: int | None = None
    """The step of its last probe; None before the first."""
    length: int | None = None
    """The draft length chosen last; None before it had a choice."""
    hot: bool = False
    """Whether its last probe was accepted whole, so that a longer one may follow at once."""
    probe_length: int = 1
    """Number of drafts of its next probe, beyond those that pay."""


@dataclass(frozen=True, slots=True)
class StepLoad:
    """The rows of one step by kind: what a cost table needs to predict its seconds."""

    num_sequences: int
    """Sequences that take part."""
    num_rows: int
    """Rows of the target's forward."""
    num_sampled: int
    """Rows of logits at a temperature above 0, the MTP layer's included."""
    num_pairs: int = 0
    """Pairs that the MTP layer extends its cache by."""
    drafting: tuple[int, ...] = (0,) * MAX_SPECULATIVE_TOKENS
    """[MAX_SPECULATIVE_TOKENS]: drafting[d] sequences draft more than d tokens."""

    @classmethod
    def plain(cls, scheduled: Seq[ScheduledSequence]) -> StepLoad:
        """Returns the load of a step of these sequences without drafts, in which the MTP layer does not run."""
        num_sampled = sum(s.samples and not s.sequence.params.greedy for s in scheduled)
        return cls(len(scheduled), sum(s.num_new_tokens for s in scheduled), num_sampled)

    def with_drafts(self, scheduled: Seq[ScheduledSequence], lengths: Seq[int]) -> StepLoad:
        """Returns the load with lengths[b] drafts of sequence b, and with the pairs that run then."""
        num_rows, num_sampled, num_pairs = self.num_rows, self.num_sampled, self.num_pairs
        drafting = list(self.drafting)
        for s, k in zip(scheduled, lengths):
            if s.extends_mtp_with(k):
                num_rows += k
                num_pairs += s.sequence.num_pending_pairs
                num_sampled += 0 if s.sequence.params.greedy else 2 * k
                for depth in range(k):
                    drafting[depth] += 1
        return StepLoad(self.num_sequences, num_rows, num_sampled, num_pairs, tuple(drafting))

    def with_probe(self, scheduled: ScheduledSequence, first: int, extra: int) -> StepLoad:
        """Returns the load with `extra` more drafts of a sequence that has `first` of them."""
        sequence = scheduled.sequence
        return StepLoad(
            self.num_sequences,
            self.num_rows + extra,
            self.num_sampled + (0 if sequence.params.greedy else 2 * extra),
            self.num_pairs + (0 if first else sequence.num_pending_pairs),
            tuple(n + (first <= depth < first + extra) for depth, n in enumerate(self.drafting)),
        )

    def seconds(self, table: CostTable) -> float:
        """Returns the seconds that the step is expected to take by the table."""
        return table.seconds(self.num_sequences, self.num_rows, self.num_pairs, self.drafting, self.num_sampled)


@dataclass(slots=True)
class StepPlan:
    """What is decided about one step. The letter b stands for a place among its scheduled sequences."""

    members: list[int]
    """The places b of the "auto" sequences that sample."""
    requests: list[RequestState]
    """requests[i] is the state of members[i]."""
    lengths: list[int]
    """lengths[i] is the draft length of members[i], probes aside."""
    load: StepLoad
    """Rows of the whole step, probes and flushed pairs included."""
    plain_s: float
    """Seconds of the same step without drafts, by the table."""
    extra: dict[int, int] = field(default_factory=dict)
    """Probes: how many more tokens than its length sequence b drafts, by b."""
    flushed: list[int] = field(default_factory=list)
    """The places b of sequences whose waiting pairs run though they draft nothing."""


def members_of(scheduled: Seq[ScheduledSequence]) -> list[int]:
    """Returns the places b of the sequences that sample in this step and leave their draft length to the controller."""
    return [b for b, s in enumerate(scheduled) if s.sequence.speculation.automatic and s.samples]


def plan_step(
    table: CostTable,
    scheduled: Seq[ScheduledSequence],
    members: list[int],
    requests: list[RequestState],
    lengths: list[int],
) -> StepPlan:
    """Returns the plan with lengths[i] drafts of members[i]; sequences that are no members draft what they may.

    table: the costs to predict by.
    scheduled: all sequences of the step.
    members, requests, lengths: see the fields of `StepPlan`.
    """
    drafts = [s.num_draft_tokens for s in scheduled]
    for b, k in zip(members, lengths):
        drafts[b] = k
    plain = StepLoad.plain(scheduled)
    return StepPlan(members, requests, lengths, plain.with_drafts(scheduled, drafts), plain.seconds(table))
