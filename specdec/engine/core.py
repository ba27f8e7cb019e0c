"""`EngineCore`: scheduler, stages and admission wired together, below the front doors. One thread calls it."""

from __future__ import annotations

import copy
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

import torch

from specdec.auto_length.controller import AutoDraftLength
from specdec.auto_length.measure import cost_table
from specdec.cache.pages import PagePool
from specdec.config import EngineConfig
from specdec.engine.admission import Admission
from specdec.loading import Checkpoint, Runtime
from specdec.metrics.engine import EngineStats
from specdec.request.sequence import FinishReason, Sequence
from specdec.step.commit import abort, fail
from specdec.step.draft import Drafter, MTPDrafter, NoDrafter
from specdec.step.draft_length import DraftLength, FixedDraftLength
from specdec.step.scheduler import Scheduler
from specdec.step.step import Decision, StepError, step
from specdec.step.verify import TargetVerifier

log = logging.getLogger(__name__)


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
        self._stats.draft_length = self.draft_length.snapshot()
        self._alive: dict[Sequence, None] = {}  # every request that has not ended
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
        try:
            if sequence.speculation.automatic:
                self.draft_length.prepare()
            self.scheduler.add(sequence)
        except BaseException as error:
            _end(sequence, error)
            self.scheduler.remove(sequence)
            raise
        finally:
            with self._stats_lock:
                self._alive[sequence] = None
                self._stats.num_requests += 1
                self._settle([sequence])

    def step(self) -> list[Sequence]:
        """One engine step; -> the sequences that took part.

        Where it fails, those that it failed for end with the error, `Sequence.error`, and the others go on as if
        nothing had been. A KeyboardInterrupt or the like aborts all that run, and is raised.
        """
        while self._abandoned:
            self.abort(self._abandoned.popleft())
        try:
            return self._step()
        except Exception as error:  # no stage's own, which are StepErrors
            ended = self._start_over(error)
            log.error("a step failed between its stages: requests %s", [s.request_id for s in ended], exc_info=error)
            return ended
        except BaseException as interrupt:
            self._start_over(interrupt)
            raise

    def _step(self) -> list[Sequence]:
        start_s, num_failures = time.perf_counter(), 0
        try:
            done = step(self.scheduler, self.draft_length, self.drafter, self.verifier)
            scheduled = done.scheduled
            if self._trace is not None:
                self._trace += done.decisions()
        except StepError as error:
            scheduled, num_failures = error.scheduled, 1
            for sequence in error.failed:
                _fail(sequence, error.error)
                self.scheduler.remove(sequence)
            self.scheduler.remove_finished()  # those that had committed
            log.error("a step failed for requests %s", [s.request_id for s in error.failed], exc_info=error.error)
        sequences = [s.sequence for s in scheduled]
        with self._stats_lock:
            self._stats.record_step(scheduled, start_s, time.perf_counter(), self.draft_length)
            self._stats.num_failed_steps += num_failures
            if any(s.speculation.automatic for s in sequences):
                self._stats.draft_length = self.draft_length.snapshot()
            self._settle(sequences)
        return sequences

    def abort(self, sequence: Sequence, reason: FinishReason = "abort") -> None:
        """Ends a request unless it has ended; its pages are free at once."""
        if not sequence.finished:
            _abort(sequence, reason)
            self._leave([sequence])

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """Ends a request with an error, unless it has ended."""
        if not sequence.finished:
            _fail(sequence, error)
            self._leave([sequence])

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

    def _start_over(self, error: BaseException) -> list[Sequence]:
        """After what came in the middle of a step, whatever it left half done: ends all requests but those that wait,
        or, where there are no others, the first of these. Everything cached is forgotten. -> those that it ended."""
        waiting = set(self.scheduler.waiting)
        ended = [s for s in self._alive if s not in waiting] or self.scheduler.waiting[:1]
        self.scheduler.start_over()
        for sequence in ended:
            if not (sequence.finished and isinstance(error, Exception)):  # an interrupt may have come in its commit
                _end(sequence, error)
        self._leave(ended)
        return ended

    def _leave(self, ended: list[Sequence]) -> None:
        for sequence in ended:
            self.scheduler.remove(sequence)
        with self._stats_lock:
            self._settle(ended)

    def _settle(self, sequences: Seq[Sequence]) -> None:
        """Counts those that have ended, and that they are gone, at once: nobody sees the one without the other."""
        for sequence in sequences:
            if sequence.finished and sequence in self._alive:
                del self._alive[sequence]
                self._stats.record_finished(sequence)
        self._stats.record_state(self.scheduler)


def _end(sequence: Sequence, cause: BaseException) -> None:
    """An interrupt is no error of the request."""
    if isinstance(cause, Exception):
        _fail(sequence, cause)
    else:
        _abort(sequence, "abort")


def _abort(sequence: Sequence, reason: FinishReason) -> None:
    try:
        abort(sequence, reason)
    except Exception as error:  # of the text that was held back
        _fail(sequence, error)


def _fail(sequence: Sequence, error: Exception) -> None:
    traceback.clear_frames(error.__traceback__)  # requests keep the error: it must not keep the step's tensors
    fail(sequence, error)


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
