"""`EngineCore`: scheduler, stages and admission wired together, below the front doors. One thread calls it."""

from __future__ import annotations

import copy
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

import torch

from specdec.admission import Admission
from specdec.commit import abort, fail
from specdec.config import EngineConfig
from specdec.draft import Drafter, MTPDrafter, NoDrafter
from specdec.draft_length import AutoDraftLength, DraftLength, FixedDraftLength
from specdec.engine_stats import EngineStats
from specdec.kv_cache import PagePool
from specdec.loading import Checkpoint, Runtime
from specdec.measure import cost_table
from specdec.scheduler import ScheduledSequence, Scheduler
from specdec.sequence import FinishReason, Sequence
from specdec.step import Decision, StepError, step
from specdec.verify import TargetVerifier


class EngineCore:
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime, config: EngineConfig) -> None:
        self.admission = Admission(
            checkpoint, runtime.max_model_len, config.speculation, has_mtp=runtime.model.mtp is not None
        )
        pool = PagePool(runtime.num_pages, config.page_size, prefix_caching=config.prefix_caching)
        self.scheduler = Scheduler(pool, config.max_num_seqs, config.token_budget)
        self.draft_length = _make_draft_length(checkpoint, runtime, config)
        self.drafter = _make_drafter(runtime, config)
        self.verifier = TargetVerifier(runtime.model.target, runtime.kv_cache, config.page_size)
        self._stats, self._stats_lock = EngineStats(pool.num_pages, config.prefix_caching), threading.Lock()
        self._stats.draft_length = self.draft_length.stats
        self._abandoned: deque[Sequence] = deque()
        self._trace: list[Decision] | None = None

    def use_device(self) -> None:
        """Makes its CUDA device, if it has one, the calling thread's."""
        device = self.verifier.kv_cache.device
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def add(self, sequence: Sequence) -> None:
        """Queues a request. Raises CacheFullError, with which the request ends, where the whole cache could not hold
        it."""
        with self._stats_lock:
            self._stats.num_requests += 1
        try:
            if sequence.speculation.automatic:
                self.draft_length.prepare()
            self.scheduler.add(sequence)
        except Exception as error:
            self._fail([sequence], error)
            raise
        with self._stats_lock:
            self._stats.record_state(self.scheduler)

    def step(self) -> list[Sequence]:
        """One engine step; -> the sequences that took part.

        Where it fails, those that it failed for end with the error, `Sequence.error`, and the others go on as if
        nothing had been. A KeyboardInterrupt or the like aborts all that run, and is raised.
        """
        while self._abandoned:
            self.abort(self._abandoned.popleft())
        start_s, num_failures = time.perf_counter(), 0
        try:
            done = step(self.scheduler, self.draft_length, self.drafter, self.verifier)
            scheduled = done.scheduled
            if self._trace is not None:
                self._trace += done.decisions()
        except StepError as error:
            scheduled, num_failures = error.scheduled, 1
            self._fail(error.failed, error.error)
        except Exception as error:  # the scheduler's own: nothing is known of those that run, or wait where none does
            failed = list(self.scheduler.running) or list(self.scheduler.waiting)
            self._fail(failed, error)
            return failed
        except BaseException:  # a half-done step may have left any of them between two states
            running = list(self.scheduler.running)
            for sequence in running:
                if not sequence.finished:
                    abort(sequence)
            self._ended(running)
            raise
        self._record(scheduled, start_s, num_failures)
        return [s.sequence for s in scheduled]

    def abort(self, sequence: Sequence, reason: FinishReason = "abort") -> None:
        """Ends a request unless it has ended; its pages are free at once."""
        if not sequence.finished:
            try:
                abort(sequence, reason)
            finally:
                self._ended([sequence])

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """Ends a request with an error, unless it has ended."""
        if not sequence.finished:
            self._fail([sequence], error)

    def abandon(self, sequence: Sequence) -> None:
        """Aborts it before the next step; from a finaliser, which may run in the middle of one."""
        self._abandoned.append(sequence)

    def reject(self) -> None:
        """Counts a request that was refused because too many wait. Any thread may call it."""
        with self._stats_lock:
            self._stats.num_rejected += 1

    def stats(self) -> EngineStats:
        """A snapshot, between two steps. Any thread may call it."""
        with self._stats_lock:
            return copy.deepcopy(self._stats)

    @contextmanager
    def traced(self) -> Iterator[list[Decision]]:
        """The list receives every step's decisions while it is entered, prefill's first tokens included."""
        trace: list[Decision] = []
        self._trace = trace
        try:
            yield trace
        finally:
            self._trace = None

    def _fail(self, sequences: Seq[Sequence], error: Exception) -> None:
        traceback.clear_frames(error.__traceback__)  # requests keep the error: it must not keep the step's tensors
        for sequence in sequences:
            fail(sequence, error)
        self._ended(sequences)

    def _ended(self, sequences: Seq[Sequence]) -> None:
        for sequence in sequences:
            self.scheduler.remove(sequence)
        self.scheduler.remove_finished()  # those that a failed step had committed
        with self._stats_lock:
            for sequence in sequences:
                self._stats.record_finished(sequence)
            self._stats.record_state(self.scheduler)

    def _record(self, scheduled: Seq[ScheduledSequence], start_s: float, num_failures: int) -> None:
        with self._stats_lock:
            self._stats.record_step(scheduled, start_s, time.perf_counter(), self.draft_length)
            self._stats.num_failed_steps += num_failures
            self._stats.record_state(self.scheduler)


def _make_draft_length(checkpoint: Checkpoint, runtime: Runtime, config: EngineConfig) -> DraftLength:
    """Costs are measured when the first "auto" request arrives, and corrected by the clock, unless they are given."""
    if runtime.model.mtp is None:
        return FixedDraftLength()
    if (given := config.cost_table) is not None:
        return AutoDraftLength(lambda _: given, follow_clock=False)
    return AutoDraftLength(lambda wrong: cost_table(runtime, checkpoint.tokenizer, config, wrong))


def _make_drafter(runtime: Runtime, config: EngineConfig) -> Drafter:
    model, cache = runtime.model, runtime.kv_cache
    if model.mtp is None:
        return NoDrafter()
    return MTPDrafter(model.target, model.mtp, cache[-1], config.page_size, config.mtp_recycling)
