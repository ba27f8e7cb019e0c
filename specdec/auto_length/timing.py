"""Times some steps by the clock, and what passes between two."""

from __future__ import annotations

from collections.abc import Callable

from specdec.auto_length.plan import StepPlan
from specdec.cost import CostTable
from specdec.step.draft_length import DraftLengthStats

BETWEEN_DECISIONS = 16.0  # decisions over which the time between steps is averaged


class Timer:
    """Measures steps and writes what it finds into the statistics."""

    def __init__(self, clock: Callable[[], float], stats: DraftLengthStats) -> None:
        """clock: returns seconds. stats: its `times` and `between_s` are kept up to date."""
        self._clock, self._stats = clock, stats
        self._started_s: float | None = None  # of a step that is timed
        self._ended_s: float | None = None  # of the last step

    def skip(self) -> None:
        """Leaves the next step out of the sample."""
        self._started_s = None

    def start(self) -> None:
        """Begins to time a step, before its drafts."""
        self._started_s = self._clock()

    def stop(self, plan: StepPlan, table: CostTable) -> None:
        """Ends a step, after its commit; compares its seconds with the plan's if it was timed."""
        self._ended_s = self._clock()
        if self._started_s is not None:
            load, measured_s = plan.load, self._ended_s - self._started_s
            self._stats.times.record(load.seconds(table), measured_s, drafts=load.num_pairs > 0)

    def record_between(self, most_s: float) -> None:
        """Counts the time since the last step, at most `most_s` seconds: that of scheduling and of what serves the
        requests. The limit leaves out a wait for a slow reader."""
        if self._ended_s is not None:
            between_s = min(self._clock() - self._ended_s, most_s)
            self._stats.between_s += (between_s - self._stats.between_s) / BETWEEN_DECISIONS
