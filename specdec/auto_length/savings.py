"""Saves up time for steps that do more than is expected to pay."""

from __future__ import annotations

SAVING_STEPS = 256  # the most that is saved up is the share of so many steps


class Savings:
    """A budget of seconds: a share of the time that steps take, kept until it is spent."""

    def __init__(self, share: float, saved_s: float) -> None:
        """Starts a budget.

        share: share of the time that may be spent.
        saved_s: seconds that there are before the first step; infinity for as much as can be saved up.
        """
        self.share, self.saved_s = share, saved_s

    def save(self, step_s: float, num_steps: int) -> None:
        """Adds the share of `num_steps` steps of `step_s` seconds, up to that of SAVING_STEPS steps."""
        share_s = self.share * step_s
        self.saved_s = min(share_s * SAVING_STEPS, self.saved_s + share_s * num_steps)

    def spend(self, seconds: float, debt_s: float = 0.0) -> bool:
        """Takes the seconds out and returns True, or returns False if they would leave more than `debt_s` of debt."""
        if seconds > self.saved_s + debt_s:
            return False
        self.saved_s -= seconds
        return True

    def earn(self, seconds: float) -> None:
        """Adds seconds that what they were spent on has saved."""
        self.saved_s += seconds
