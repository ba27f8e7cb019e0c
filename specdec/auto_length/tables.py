"""Holds the cost table in use, which is measured again where it has proved wrong."""

from __future__ import annotations

from collections.abc import Callable

from specdec.cost import CostTable, StepTimes

MIN_TIMED_STEPS, MIN_FACTOR, MAX_TABLES = 16, 0.7, 3  # when a table is measured again


class MeasuredTable:
    """A cost table that is measured when it is asked for; `current` is None until then."""

    def __init__(self, measure: Callable[[CostTable | None], CostTable]) -> None:
        """measure: returns a table; it is given the one that has proved wrong, None at first."""
        self.current: CostTable | None = None
        self._measure = measure
        self._num_tables = 0

    def measure(self) -> None:
        """Measures a table and takes it into use."""
        self.current = self._measure(self.current)
        self._num_tables += 1

    def is_wrong(self, times: StepTimes) -> bool:
        """Returns whether plain steps turned out much faster than the table says: it was measured on a busy machine.
        False once tables were measured too often."""
        plain = times.plain
        return plain.num_steps >= MIN_TIMED_STEPS and plain.factor < MIN_FACTOR and self._num_tables < MAX_TABLES
