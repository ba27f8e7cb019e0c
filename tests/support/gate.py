"""An engine's thread that waits for a test."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq

from specdec import AsyncEngine
from specdec.kernels.decisions import Drafts
from specdec.step.scheduler import ScheduledSequence
from specdec.step.verify import TargetResult

PATIENCE_S = 60.0


class Gate:
    """Lets the engine's thread make so many steps, then holds it before a forward until it is opened."""

    def __init__(self, engine: AsyncEngine, num_steps: int = 0) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self._num_steps, self._verifier = num_steps, engine._core.verifier
        engine._core.verifier = self

    def verify(self, scheduled: Seq[ScheduledSequence], drafts: Drafts) -> TargetResult:
        if self._num_steps == 0:
            self.reached.set()
            assert self.open.wait(PATIENCE_S)
        else:
            self._num_steps -= 1
        return self._verifier.verify(scheduled, drafts)


class Turnstile:
    """Lets the engine's thread make one forward for each `let_through`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._permits, self._verifier = threading.Semaphore(0), engine._core.verifier
        self.let_through = self._permits.release
        engine._core.verifier = self

    def verify(self, scheduled: Seq[ScheduledSequence], drafts: Drafts) -> TargetResult:
        assert self._permits.acquire(timeout=PATIENCE_S)
        return self._verifier.verify(scheduled, drafts)
