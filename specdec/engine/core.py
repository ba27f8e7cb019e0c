"""`EngineCore`: scheduler, stages and admission wired together, below the front doors, which let one thread in."""

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
from specdec.engine.admission import Admission, DraftsWith
from specdec.errors import EngineInUseError
from specdec.loading import Checkpoint, Runtime
from specdec.metrics.engine import EngineStats
from specdec.request.sequence import FinishReason, Sequence
from specdec.step.draft import DraftStage, MTPDrafts, NoDrafts
from specdec.step.draft_length import DraftLength, FixedDraftLength
from specdec.step.drafter import Drafter, OwnDrafts
from specdec.step.scheduler import Scheduler
from specdec.step.step import Decision, StepError, StepResult, Verifier, one_at_a_time, step
from specdec.step.verify import TargetVerifier

log = logging.getLogger(__name__)


class EngineCore:
    """The engine below the front doors: queues requests, steps them all, and ends them.

    Other objects of their protocols may be assigned to draft_length, drafter and verifier between two steps.
    """

    draft_length: DraftLength
    """Says how many tokens each sequence drafts."""
    drafter: DraftStage
    """Proposes drafts."""
    verifier: Verifier
    """Decides tokens."""

    def __init__(
        self, checkpoint: Checkpoint, runtime: Runtime, config: EngineConfig, drafter: Drafter | None = None
    ) -> None:
        """drafter: drafts in place of the MTP layer, which the runtime does not have then."""
        drafts_with, self.drafter = _make_drafts(runtime, config, drafter)
        self.admission = Admission(checkpoint, runtime.max_model_len, config.speculation, drafts_with)
        pool = PagePool(runtime.num_pages, config.page_size, prefix_caching=config.prefix_caching)
        self.scheduler = Scheduler(pool, config.max_num_seqs, config.token_budget)
        self.draft_length = _make_draft_length(checkpoint, runtime, config)
        self.verifier = TargetVerifier(runtime.model.target, runtime.kv_cache, config.page_size)
        self._device = runtime.kv_cache.device
        self._stats, self._stats_lock = EngineStats(pool.num_pages, config.prefix_caching), threading.Lock()
        self._stats.draft_length = self.draft_length.snapshot()
        self._alive: dict[Sequence, None] = {}  # every request that has not ended
        self._abandoned: deque[Sequence] = deque()
        self._trace: list[Decision] | None = None
        self._used = threading.Lock()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps all other callers out while the context is entered. Raises EngineInUseError where one is in."""
        if not self._used.acquire(blocking=False):
            raise EngineInUseError(
                "another call of this engine is under way, in another thread or in an AsyncEngine: an Engine serves "
                "one call at a time; make one after the other, or let an AsyncEngine serve many requests at once"
            )
        try:
            yield
        finally:
            self._used.release()

    def use_device(self) -> None:
        """Makes the engine's CUDA device, if it has one, the calling thread's."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def add(self, sequence: Sequence) -> None:
        """Queues a request. Raises CacheFullError, with which the request ends, where the whole cache could not hold
        it."""
        try:
            if sequence.speculation.automatic:
                self.draft_length.prepare()
            self.scheduler.add(sequence)
        except BaseException as error:
            self._end(sequence, *_ending(error))
            raise
        finally:
            with self._stats_lock:
                self._alive[sequence] = None
                self._stats.num_requests += 1
                self._count_ended([sequence])

    def step(self) -> list[Sequence]:
        """Runs one engine step; returns the sequences that took part.

        Where it fails, those that it failed for end with the error, `Sequence.error`, and the others go on as if
        nothing had been. A KeyboardInterrupt or the like aborts all that run, and is raised.
        """
        while self._abandoned:
            self.end(self._abandoned.popleft(), "abort")
        try:
            return self._step()
        except Exception as error:  # no stage's own, which are StepErrors
            ended = self._recover(error)
            _log_failure("a step failed between its stages", ended, error)
            return ended
        except BaseException as interrupt:
            self._recover(interrupt)
            raise

    def _step(self) -> list[Sequence]:
        start_s, num_failures = time.perf_counter(), 0
        stages = self.draft_length, self.drafter, self.verifier
        outcomes: list[StepResult | StepError]
        try:
            outcomes = [step(self.scheduler, *stages)]
        except StepError as error:
            num_failures = 1
            if error.knows_for_whom:
                outcomes = [error]
            else:
                _log_failure("a step failed, and is tried again one request at a time,", error.failed, error.error)
                outcomes = one_at_a_time(error.scheduled, *stages)
            self._end_failed(outcomes)
        if self._trace is not None:
            self._trace += [d for outcome in outcomes if isinstance(outcome, StepResult) for d in outcome.decisions()]
        scheduled = [s for outcome in outcomes for s in outcome.scheduled]
        records = [record for outcome in outcomes for record in outcome.records]
        sequences = [s.sequence for s in scheduled]
        with self._stats_lock:
            self._stats.record_step(scheduled, records, start_s, time.perf_counter(), self.draft_length)
            self._stats.num_failed_steps += num_failures
            if any(s.speculation.automatic for s in sequences):
                self._stats.draft_length = self.draft_length.snapshot()
            self._count_ended(sequences)
        return sequences

    def _end_failed(self, outcomes: Seq[StepResult | StepError]) -> None:
        """Ends the requests that a step failed for, and takes out those that it has finished."""
        for outcome in outcomes:
            if isinstance(outcome, StepError):
                for sequence in outcome.failed:
                    self._end(sequence, "error", outcome.error)
                _log_failure("a step failed", outcome.failed, outcome.error)
        self.scheduler.remove_finished()

    def end(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> bool:
        """Ends a request between two steps, unless it has ended: out of its queue, its pages free, counted.

        error: what ended it, with reason "error". Returns whether this call ended it.
        """
        if sequence.finished:
            return False
        self._end(sequence, reason, error)
        with self._stats_lock:
            self._count_ended([sequence])
        return True

    def abandon(self, sequence: Sequence) -> None:
        """Aborts a request before the next step. Finalisers call it, which may run in the middle of one."""
        self._abandoned.append(sequence)

    def reject(self) -> None:
        """Counts a request that was refused because too many wait. Any thread may call it."""
        with self._stats_lock:
            self._stats.num_rejected += 1

    def stats(self) -> EngineStats:
        """Returns a snapshot of the statistics, between two steps. Any thread may call it."""
        with self._stats_lock:
            return copy.deepcopy(self._stats)

    @contextmanager
    def traced(self) -> Iterator[list[Decision]]:
        """Yields a list that receives every step's decisions while the context is entered, prefill's first tokens
        included."""
        trace: list[Decision] = []
        self._trace = trace
        try:
            yield trace
        finally:
            self._trace = None

    def _recover(self, error: BaseException) -> list[Sequence]:
        """Recovers from an exception inside a step, whatever that left half done.

        Ends every running request (if none runs, the first waiting one), frees all pages, empties the prefix cache.
        Returns the ended requests.
        """
        waiting = set(self.scheduler.waiting)
        ended = [s for s in self._alive if s not in waiting] or self.scheduler.waiting[:1]
        self.scheduler.start_over()
        for sequence in ended:
            if not (sequence.finished and isinstance(error, Exception)):  # an interrupt may have come in its commit
                self._end(sequence, *_ending(error))
        with self._stats_lock:
            self._count_ended(ended)
        return ended

    def _end(self, sequence: Sequence, reason: FinishReason, error: Exception | None) -> None:
        """Ends a request and takes it out of its queue; `_count_ended` is to follow."""
        try:
            sequence.end(reason, error)
        except Exception as text_error:  # the text that was held back cannot be decoded
            sequence.end("error", text_error)
        self.scheduler.remove(sequence)

    def _count_ended(self, sequences: Seq[Sequence]) -> None:
        """Moves those of these requests that have ended from "running" to "finished" in the statistics, and counts what
        is left running, waiting and used.

        The caller holds the lock of the statistics, so no snapshot shows a request as both running and ended.
        """
        for sequence in sequences:
            if sequence.finished and sequence in self._alive:
                del self._alive[sequence]
                self._stats.record_finished(sequence)
        self._stats.record_state(self.scheduler)


def _ending(cause: BaseException) -> tuple[FinishReason, Exception | None]:
    """Returns how a request ends by an exception; an interrupt is no error of the request."""
    return ("error", cause) if isinstance(cause, Exception) else ("abort", None)


def _log_failure(what: str, failed: Seq[Sequence], error: BaseException) -> None:
    """Logs a failure with its traceback as text: a record that kept the error itself would keep its frames, and all
    they refer to."""
    text = "".join(traceback.format_exception(error)).rstrip()
    log.error("%s for requests %s\n%s", what, [s.request_id for s in failed], text)


def _make_draft_length(checkpoint: Checkpoint, runtime: Runtime, config: EngineConfig) -> DraftLength:
    """Returns what chooses draft lengths. Costs are measured when the first "auto" request arrives, and corrected by
    the clock, unless they are given."""
    if runtime.model.mtp is None:
        return FixedDraftLength()
    if (given := config.cost_table) is not None:
        return AutoDraftLength(lambda _: given, follow_clock=False)
    return AutoDraftLength(lambda wrong: cost_table(runtime, checkpoint.tokenizer, config, wrong))


def _make_drafts(runtime: Runtime, config: EngineConfig, drafter: Drafter | None) -> tuple[DraftsWith, DraftStage]:
    """Returns what drafts, and the stage that runs it."""
    model, cache = runtime.model, runtime.kv_cache
    if drafter is not None:
        return "drafter", OwnDrafts(drafter, model.config.vocab_size)
    if model.mtp is None:
        return "nothing", NoDrafts()
    return "mtp", MTPDrafts(model.target, model.mtp, cache[-1], config.page_size, config.mtp_recycling)
