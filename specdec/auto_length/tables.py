"""The cost table in use, which is measured again where it has proved wrong."""

from __future__ import annotations

from collections.abc import Callable

from specdec.cost import CostTable, StepTimes

MIN_TIMED_STEPS, MIN_FACTOR, MAX_TABLES = 16, 0.7, 3  # when a table is measured again


class MeasuredTable:
    """A cost table that is there from the first measurement on."""

    def __init__(self, measure: Callable[[CostTable | None], CostTable]) -> None:
        """measure: gives a table; another one, where it is given the one that has proved wrong."""
        self.current: CostTable | None = None
        self._measure = measure
        self._num_tables = 0

    def measure(self) -> None:
        self.current = self._measure(self.current)
        self._num_tables += 1

    def is_wrong(self, times: StepTimes) -> bool:
        """Returns whether plain steps turned out much faster than the table says: it was measured on a busy machine.
        False once tables were measured too often."""
        plain = times.plain
        return plain.num_steps >= MIN_TIMED_STEPS and plain.factor < MIN_FACTOR and self._num_tables < MAX_TABLES
