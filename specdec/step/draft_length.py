"""How many tokens each sequence drafts in a step: what a step asks, and the answer that leaves budgets as they are.

`specdec.auto_length` has the controller that chooses by cost and acceptance.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from specdec.config import MAX_SPECULATIVE_TOKENS
from specdec.cost import StepTimes
from specdec.step.scheduler import ScheduledSequence


class DraftLength(Protocol):
    """Chooses every sequence's number of drafts, at most what the scheduler allows."""

    def snapshot(self) -> DraftLengthStats | None:
        """A copy of the statistics, which no later step changes; None where nothing is chosen."""
        ...

    def prepare(self) -> None:
        """Measures what choosing needs and is not known, or has proved wrong: tenths of a second. Called between two
        steps, when an "auto" request arrives."""
        ...

    def choose(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """The same sequences in the same order, `num_draft_tokens` lowered and `flushes` set as it decides. Called
        before anything is drafted in this step."""
        ...

    def record(self, scheduled: Seq[ScheduledSequence], drafts: Seq[Seq[int]], output_token_ids: Seq[Seq[int]]) -> None:
        """What became of the step, after its commit: the drafts verified of each sequence, and what it emitted."""
        ...

    def plain_step_s(self, rows: int) -> float | None:
        """Seconds of a step of so many sequences that decode without drafts; None where costs are not known."""
        ...


class FixedDraftLength:
    """As many as the scheduler allows."""

    def snapshot(self) -> DraftLengthStats | None:
        return None

    def prepare(self) -> None:
        pass

    def choose(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        return scheduled

    def record(self, scheduled: Seq[ScheduledSequence], drafts: Seq[Seq[int]], output_token_ids: Seq[Seq[int]]) -> None:
        pass

    def plain_step_s(self, rows: int) -> float | None:
        return None


@dataclass
class DraftLengthStats:
    """What an `AutoDraftLength` decided, in steps with at least one "auto" request. Times are of a sample of
    steps, without prompts.

    chosen[k]: sequences that were to draft k tokens in a step. num_probes: those that drafted more than was expected
    to pay; num_flushes: those whose waiting pairs the MTP layer ran without drafting. between_s: from the end of a step
    to the next one's drafts, lately.
    """

    chosen: list[int] = field(default_factory=lambda: [0] * (MAX_SPECULATIVE_TOKENS + 1))
    num_probes: int = 0
    num_flushes: int = 0
    between_s: float = 0.0
    times: StepTimes = field(default_factory=StepTimes)

    def as_dict(self) -> dict[str, object]:
        return {
            "chosen": list(self.chosen),
            "num_probes": self.num_probes,
            "num_flushes": self.num_flushes,
            "between_s": self.between_s,
            "predicted_s": self.times.predicted_s,
            "measured_s": self.times.measured_s,
            "median_relative_error": self.times.median_relative_error,
        }
