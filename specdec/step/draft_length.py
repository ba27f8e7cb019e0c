"""The protocol by which a step asks how many tokens each sequence drafts, and the answer that leaves budgets as they
are.

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
        """Returns a copy of the statistics, which no later step changes; None where nothing is chosen."""
        ...

    def prepare(self) -> None:
        """Measures the costs that choosing needs, where they are not known or have proved wrong, which takes tenths of
        a second. Called between two steps, when an "auto" request arrives."""
        ...

    def choose(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """Lowers `num_draft_tokens` and sets `flushes` as it decides; returns the same sequences in the same order.
        Called before anything is drafted in this step."""
        ...

    def record(self, scheduled: Seq[ScheduledSequence], drafts: Seq[Seq[int]], output_token_ids: Seq[Seq[int]]) -> None:
        """Learns what became of a step. Called after its commit.

        scheduled: its sequences.
        drafts: the drafts of each that were verified.
        output_token_ids: what each of them emitted.
        """
        ...

    def plain_step_s(self, rows: int) -> float | None:
        """Returns the seconds of a step of so many sequences that decode without drafts; None where costs are not
        known.
        """
        ...


class FixedDraftLength:
    """Leaves every draft budget as the scheduler set it."""

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
    """What was decided for draft length "auto", in steps with at least one such request."""

    chosen: list[int] = field(default_factory=lambda: [0] * (MAX_SPECULATIVE_TOKENS + 1))
    """chosen[k]: how often a sequence was to draft k tokens in a step."""
    num_probes: int = 0
    """How often a sequence drafted more than was expected to pay, to see whether acceptance has risen."""
    num_flushes: int = 0
    """How often the MTP layer ran over a sequence's waiting pairs without drafting."""
    between_s: float = 0.0
    """Seconds from the end of a step to the next one's drafts, lately."""
    times: StepTimes = field(default_factory=StepTimes)
    """Predicted and measured seconds of a sample of steps, those with prompts left out."""

    def as_dict(self) -> dict[str, object]:
        """Returns a document for JSON, see docs/json.md."""
        return {
            "chosen": list(self.chosen),
            "num_probes": self.num_probes,
            "num_flushes": self.num_flushes,
            "between_s": self.between_s,
            "predicted_s": self.times.predicted_s,
            "measured_s": self.times.measured_s,
            "median_relative_error": self.times.median_relative_error,
        }
