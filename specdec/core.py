"""`EngineCore`: scheduler, stages and admission wired together, below the front doors. One thread calls it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from specdec.admission import Admission
from specdec.commit import abort
from specdec.config import EngineConfig
from specdec.draft import Drafter, MTPDrafter, NoDrafter
from specdec.kv_cache import PagePool
from specdec.loading import Checkpoint, Runtime
from specdec.scheduler import Scheduler
from specdec.sequence import Sequence
from specdec.step import Decision, step
from specdec.verify import TargetVerifier


class EngineCore:
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime, config: EngineConfig) -> None:
        self.admission = Admission(
            checkpoint, runtime.max_model_len, config.speculation, has_mtp=runtime.model.mtp is not None
        )
        pool = PagePool(runtime.num_pages, config.page_size, prefix_caching=config.prefix_caching)
        self.scheduler = Scheduler(pool, config.max_num_seqs, config.token_budget)
        self.drafter = _make_drafter(runtime, config)
        self.verifier = TargetVerifier(runtime.model.target, runtime.kv_cache, config.page_size)
        self._abandoned: deque[Sequence] = deque()
        self._trace: list[Decision] | None = None

    def step(self) -> None:
        """One engine step. Where it fails, the running requests are aborted and the error is raised."""
        while self._abandoned:
            self.abort(self._abandoned.popleft())
        try:
            done = step(self.scheduler, self.drafter, self.verifier)
        except BaseException:  # a half-done step may have left any of them between two states
            for sequence in list(self.scheduler.running):
                self.abort(sequence)
            raise
        if self._trace is not None:
            self._trace += done.decisions()

    def abort(self, sequence: Sequence) -> None:
        """Ends a request unless it has ended; its pages are free at once."""
        if not sequence.finished:
            abort(sequence)
            self.scheduler.remove(sequence)

    def abandon(self, sequence: Sequence) -> None:
        """The same before the next step; from a finaliser, which may run in the middle of one."""
        self._abandoned.append(sequence)

    @contextmanager
    def traced(self) -> Iterator[list[Decision]]:
        """The list receives every step's decisions while it is entered, prefill's first tokens included."""
        trace: list[Decision] = []
        self._trace = trace
        try:
            yield trace
        finally:
            self._trace = None


def _make_drafter(runtime: Runtime, config: EngineConfig) -> Drafter:
    model, cache = runtime.model, runtime.kv_cache
    if model.mtp is None:
        return NoDrafter()
    return MTPDrafter(model.target, model.mtp, cache[-1], config.page_size, config.mtp_recycling)
