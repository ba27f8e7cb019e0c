"""Predicts what a step costs: seconds of its parts by number of rows. No torch here.

`specdec.auto_length.measure` measures a table on the running machine, and `specdec.auto_length.controller` chooses
draft lengths by it.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import dataclass
from functools import cached_property

from specdec.checks import require, require_int, require_number

NUM_DENSE = 512  # rows whose seconds are looked up, not computed
CORRECTION_STEPS = 64  # steps over which the correction follows a drift
MAX_ERROR = 0.25  # the most that one step's relative error counts
MIN_STEPS = 4  # steps of either kind, before they are compared
NUM_RECENT_STEPS = 512  # steps whose errors are kept


class Curve:
    """Seconds by number of rows, from some measured entries; 0 for no rows, and where there are no entries.

    Linear between the two nearest entries, the least entry below them, in proportion to the rows beyond the last.
    """

    def __init__(self, entries: Mapping[int, float]) -> None:
        """entries: seconds by number of rows, at least 1."""
        self._rows = sorted(entries)
        self._seconds = [entries[rows] for rows in self._rows]
        self._dense = [0.0, *(self.interpolate(rows) for rows in range(1, NUM_DENSE))]

    def __call__(self, rows: int) -> float:
        """Returns the seconds of so many rows."""
        return self._dense[rows] if rows < NUM_DENSE else self.interpolate(rows)

    def increment(self, rows: int) -> float:
        """Returns the seconds that one more row adds to so many."""
        if rows + 1 < NUM_DENSE:
            return self._dense[rows + 1] - self._dense[rows]
        return self(rows + 1) - self(rows)

    def interpolate(self, rows: float) -> float:
        """Returns the seconds of a number of rows that need not be whole."""
        known, seconds = self._rows, self._seconds
        if not known:
            return 0.0
        if rows >= known[-1]:
            return seconds[-1] * rows / known[-1]
        high = bisect_left(known, rows)
        if high == 0 or known[high] == rows:
            return seconds[high]
        share = (rows - known[high - 1]) / (known[high] - known[high - 1])
        return seconds[high - 1] + share * (seconds[high] - seconds[high - 1])


@dataclass(frozen=True)
class CostTable:
    """Seconds that the parts of a step take on one machine, by number of rows.

    Raises ValueError for rows below 1 and for seconds that are not positive.
    """

    target: dict[int, float]
    """Seconds of a target forward with the choice of tokens, all argmaxes, by number of its rows. At least one
    entry."""
    mtp_extend: dict[int, float]
    """Seconds of the MTP layer over pending pairs, with one draft of each sequence, by number of pairs. Empty without
    an MTP layer."""
    mtp_step: dict[int, float]
    """Seconds of each further draft, one row per sequence, by number of sequences. Empty without an MTP layer."""
    sequence_s: float = 0.0
    """Seconds that every sequence adds to a step beyond its rows."""
    sampled_s: float = 0.0
    """Seconds that a row of logits takes more at a temperature above 0."""

    def __post_init__(self) -> None:
        for name, entries in (("target", self.target), ("mtp_extend", self.mtp_extend), ("mtp_step", self.mtp_step)):
            require(
                isinstance(entries, Mapping) and (len(entries) > 0 or name != "target"),
                f"{name} = {entries!r} must map numbers of rows, at least 1, to seconds above 0",
            )
            for rows, seconds in entries.items():
                require_int(f"{name}: rows", rows, 1)
                require_number(f"{name}[{rows}]", seconds, 0, open_low=True)
        for name, seconds in (("sequence_s", self.sequence_s), ("sampled_s", self.sampled_s)):
            require_number(name, seconds, 0)

    @cached_property
    def target_s(self) -> Curve:
        """Seconds of a target forward, by number of rows."""
        return Curve(self.target)

    @cached_property
    def extend_s(self) -> Curve:
        """Seconds of the MTP layer over pending pairs, with one draft of each sequence, by number of pairs."""
        return Curve(self.mtp_extend)

    @cached_property
    def step_s(self) -> Curve:
        """Seconds of one further draft of each sequence, by number of sequences."""
        return Curve(self.mtp_step)

    @cached_property
    def pair_s(self) -> float:
        """Seconds that one more pending pair adds to a large MTP extend."""
        return self.extend_s(NUM_DENSE) / NUM_DENSE

    def plain_s(self, num_sequences: int) -> float:
        """Returns the predicted seconds of a step of so many sequences that decode greedily without drafts."""
        return self.sequence_s * num_sequences + self.target_s(num_sequences)

    def seconds(
        self, num_sequences: int, num_rows: int, num_pairs: int, drafting: Seq[int], num_sampled: int = 0
    ) -> float:
        """Returns the predicted seconds of one engine step.

        num_sequences: sequences that take part.
        num_rows: rows of the target's forward.
        num_pairs: pairs that the MTP layer extends its cache by.
        drafting: drafting[d] sequences have more than d drafts.
        num_sampled: rows of logits, the MTP layer's included, that are sampled.
        """
        small = self.small_s(num_sequences, num_sampled)
        return small + self.target_s(num_rows) + self.extend_s(num_pairs) + self.chain_s(drafting)

    def small_s(self, num_sequences: int, num_sampled: int) -> float:
        """Returns the predicted seconds that sequences and sampled rows add to a step."""
        return self.sequence_s * num_sequences + self.sampled_s * num_sampled

    def chain_s(self, drafting: Seq[int]) -> float:
        """Returns the predicted seconds of the drafts after each sequence's first. drafting: drafting[d] sequences have
        more than d drafts."""
        return sum(self.step_s(count) for count in drafting[1:])

    def predict(self, batch_size: int, num_draft_tokens: int, mean_acceptance_length: float) -> float:
        """Returns the predicted tokens per second of a batch that decodes greedily.

        batch_size: number of sequences.
        num_draft_tokens: drafts of each in every step; 0 is plain decoding.
        mean_acceptance_length: tokens that a sequence gets from a step on average, from 1 to num_draft_tokens + 1.
        """
        step_s = self.sequence_s * batch_size + self.target_s(batch_size * (num_draft_tokens + 1))
        if num_draft_tokens:
            step_s += self.extend_s.interpolate(batch_size * mean_acceptance_length)
            step_s += (num_draft_tokens - 1) * self.step_s(batch_size)
        return batch_size * mean_acceptance_length / step_s


class StepTimes:
    """Predicted against measured seconds of steps. A prediction is the table's, times a factor that follows the machine
    slowly; plain steps and steps that draft have one each.

    predicted_s, measured_s: seconds of all steps that were timed, as predicted and by the clock.
    plain, drafting: the factors.
    """

    def __init__(self) -> None:
        self.forget()
        self.predicted_s = 0.0
        self.measured_s = 0.0
        self._errors: deque[float] = deque(maxlen=NUM_RECENT_STEPS)

    def forget(self) -> None:
        """Resets both factors, because a new table was measured."""
        self.plain, self.drafting = Correction(), Correction()
        self._snapshot: StepTimes | None = None

    def snapshot(self) -> StepTimes:
        """Returns a copy that does not change; the same one until a step is recorded, since few steps are."""
        if self._snapshot is None:
            other = copy(self)
            other.plain, other.drafting, other._errors = copy(self.plain), copy(self.drafting), self._errors.copy()
            self._snapshot = other
        return self._snapshot

    @property
    def drafting_factor(self) -> float:
        """How much longer steps that draft take than the table says, relative to plain ones."""
        if min(self.plain.num_steps, self.drafting.num_steps) < MIN_STEPS:
            return 1.0
        return self.drafting.factor / self.plain.factor

    @property
    def num_steps(self) -> int:
        """Steps that were timed since there is this table."""
        return self.plain.num_steps + self.drafting.num_steps

    def record(self, table_s: float, measured_s: float, *, drafts: bool) -> None:
        """Counts one step.

        table_s: its seconds by the table.
        measured_s: its seconds by the clock.
        drafts: whether the MTP layer ran in it.
        """
        self._snapshot = None
        correction = self.drafting if drafts else self.plain
        predicted = correction.factor * table_s
        if correction.num_steps > 0 and measured_s > 0:  # the first one only sets the level
            self._errors.append(abs(predicted - measured_s) / measured_s)
        self.predicted_s += predicted
        self.measured_s += measured_s
        correction.follow(measured_s / table_s)

    @property
    def median_relative_error(self) -> float | None:
        """Median of |predicted - measured| / measured over the last steps, each predicted before it was measured; None
        without any."""
        return statistics.median(self._errors) if self._errors else None


@dataclass
class Correction:
    """A factor that follows the ratios of measured to predicted seconds. The ratio of a step that was interrupted,
    which is far off, counts no more than MAX_ERROR."""

    factor: float = 1.0
    """Measured over predicted seconds, lately."""
    num_steps: int = 0
    """Ratios so far."""

    def follow(self, ratio: float) -> None:
        """Moves the factor towards a ratio; the first one sets it."""
        self.num_steps += 1
        if self.num_steps == 1:
            self.factor = ratio
        else:
            error = min(MAX_ERROR, max(-MAX_ERROR, ratio / self.factor - 1))
            self.factor *= 1 + error / min(self.num_steps, CORRECTION_STEPS)
