"""Counts what an engine did since it was made: requests, tokens, speculation, times."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import get_args

from specdec.request.sequence import FinishReason, Sequence
from specdec.request.stats import CommitRecord, DraftStats, Histogram
from specdec.step.draft_length import DraftLength, DraftLengthStats
from specdec.step.scheduler import ScheduledSequence, Scheduler

# vLLM's bounds, in seconds
FIRST_TOKEN_BOUNDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_BOUNDS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass
class EngineStats:
    """Counts and times of an engine since it was made. `Engine.stats` returns a copy, which does not change."""

    num_pages: int
    """Pages of the KV cache."""
    prefix_caching: bool = True
    """Whether the prefix cache is on."""
    num_running: int = 0
    """Requests that take part in steps now."""
    num_waiting: int = 0
    """Requests that wait now."""
    num_used_pages: int = 0
    """Pages that requests hold now."""
    num_requests: int = 0
    """Accepted requests, every one of which is running, waiting or counted in `finished`."""
    num_rejected: int = 0
    """Requests that were refused because the queue was full."""
    finished: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(get_args(FinishReason), 0))
    """Requests that have ended, by finish reason."""
    num_prompt_tokens: int = 0
    """Prompt tokens of requests whose first token is there."""
    num_output_tokens: int = 0
    """Tokens generated."""
    num_prefix_queries: int = 0
    """Tokens among num_prompt_tokens that were looked up in the prefix cache."""
    num_prefix_hits: int = 0
    """Tokens among num_prefix_queries that the prefix cache had."""
    num_preemptions: int = 0
    """How often requests that have ended had lost their pages."""
    num_steps: int = 0
    """Engine steps, failed ones included."""
    num_failed_steps: int = 0
    """Steps in which a stage failed."""
    steps_s: float = 0.0
    """Seconds of all steps, failed ones included."""
    drafts: DraftStats = field(default_factory=DraftStats)
    """Verifications of all requests."""
    queue: Histogram = field(default_factory=lambda: Histogram(REQUEST_BOUNDS))
    """Seconds from arrival to the first step, of requests that ended by "stop" or "length"."""
    prefill: Histogram = field(default_factory=lambda: Histogram(REQUEST_BOUNDS))
    """Seconds from the first step to the first token, of requests that ended by "stop" or "length"."""
    decode: Histogram = field(default_factory=lambda: Histogram(REQUEST_BOUNDS))
    """Seconds from the first to the last token, of requests that ended by "stop" or "length"."""
    latency: Histogram = field(default_factory=lambda: Histogram(REQUEST_BOUNDS))
    """Seconds from arrival to the last token, of requests that ended by "stop" or "length"."""
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS))
    """Seconds from arrival to the first token, of all requests."""
    inter_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_BOUNDS))
    """Seconds from commit to commit of a request, each of which may bring several tokens."""
    time_per_output_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_BOUNDS))
    """Seconds per token after the first one, of requests that ended by "stop" or "length"."""
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKEN_BOUNDS))
    """Rows of prompts computed and tokens generated, per step."""
    compared_s: float = 0.0
    """Seconds of the steps that decoded requests with speculation, as far as costs are known."""
    plain_s: float = 0.0
    """Seconds that the tokens of these steps would have taken without speculation, by the cost table."""
    draft_length: DraftLengthStats | None = None
    """What was decided for "auto" requests; None without an MTP layer."""

    def record_state(self, scheduler: Scheduler) -> None:
        """Reads how many requests run and wait and how many pages are used, after anything that may change it."""
        self.num_running, self.num_waiting = len(scheduler.running), len(scheduler.waiting)
        self.num_used_pages = self.num_pages - scheduler.pool.num_free

    def record_step(
        self,
        scheduled: Seq[ScheduledSequence],
        records: Seq[CommitRecord | None],
        start_s: float,
        end_s: float,
        costs: DraftLength,
    ) -> None:
        """Counts a step, failed or not, and changes no sequence.

        scheduled: the sequences of the step.
        records: what the step added to each of them, None where it decided no token; not counted for a request that the
            step failed for.
        start_s, end_s: when the step began and ended, in seconds of time.perf_counter.
        costs: knows what plain steps cost.
        """
        self.num_steps += 1
        self.steps_s += end_s - start_s
        num_rows = num_decoding = num_prefilled = num_tokens = num_deciding = 0
        speculates = False
        for s, commit in zip(scheduled, records):
            sequence = s.sequence
            num_rows += s.num_new_tokens
            num_before = sequence.stats.num_output_tokens - (commit.num_tokens if commit else 0)
            if s.num_new_tokens > 1 or num_before == 0:
                num_prefilled += s.num_new_tokens
            else:
                num_decoding += 1
                speculates = speculates or sequence.speculates
            if commit is not None and sequence.error is None:
                num_deciding += 1
                num_tokens += commit.num_tokens
                self._record_commit(sequence, commit)
        self.step_tokens.observe(num_prefilled + num_tokens)
        if speculates:
            self._compare(costs, end_s - start_s, num_rows, num_decoding, num_tokens - num_deciding)

    def record_finished(self, sequence: Sequence) -> None:
        """Counts a request's end, for whatever reason; call it once."""
        reason, stats = sequence.finish_reason, sequence.stats
        assert reason is not None
        self.finished[reason] += 1
        self.num_preemptions += stats.num_preemptions
        if reason not in ("stop", "length"):
            return
        assert stats.last_token_s is not None
        self.queue.observe(stats.queue_s or 0.0)
        self.prefill.observe(stats.prefill_s or 0.0)
        self.decode.observe(stats.decode_s)
        self.latency.observe(stats.last_token_s - stats.arrival_s)
        if stats.num_output_tokens > 1:
            self.time_per_output_token.observe(stats.decode_s / (stats.num_output_tokens - 1))

    def _record_commit(self, sequence: Sequence, commit: CommitRecord) -> None:
        self.drafts.record_verification(commit.num_draft_tokens, commit.num_accepted_tokens)
        self.num_output_tokens += commit.num_tokens
        if commit.interval_s is None:
            num_prompt = len(sequence.prompt_token_ids)
            self.num_prompt_tokens += num_prompt
            self.num_prefix_queries += num_prompt if self.prefix_caching else 0
            self.num_prefix_hits += sequence.stats.num_cached_tokens
            self.first_token.observe(sequence.stats.ttft_s or 0.0)
        else:
            self.inter_token.observe(commit.interval_s)

    def _compare(self, costs: DraftLength, step_s: float, num_rows: int, num_decoding: int, num_more: int) -> None:
        """Counts what a step took, and what plain decoding would have taken.

        That would have done this step's rows without drafts, and then further steps of the decoding requests for the
        tokens that drafts brought.

        costs: knows what plain steps cost.
        step_s: what the step took.
        num_rows: its rows without drafts.
        num_decoding: requests that decoded in it.
        num_more: tokens that drafts brought.
        """
        first_s, further_s = costs.plain_step_s(num_rows), costs.plain_step_s(num_decoding)
        if first_s is not None and further_s is not None:
            self.compared_s += step_s
            self.plain_s += first_s + num_more / num_decoding * further_s

    @property
    def saved_s(self) -> float | None:
        """Seconds that speculation saved by the estimate, below 0 where it cost time; None where there is no
        estimate."""
        return self.plain_s - self.compared_s if self.compared_s else None

    @property
    def speedup(self) -> float | None:
        """How many times faster steps were than plain decoding, by the estimate; None where there is none."""
        return self.plain_s / self.compared_s if self.compared_s else None

    def as_dict(self) -> dict[str, object]:
        """Returns a document for JSON, see docs/json.md."""
        histograms = ("queue", "prefill", "decode", "latency", "first_token", "inter_token", "time_per_output_token")
        return {
            "num_requests": self.num_requests,
            "num_running": self.num_running,
            "num_waiting": self.num_waiting,
            "num_rejected": self.num_rejected,
            "finished": dict(self.finished),
            "num_pages": self.num_pages,
            "num_used_pages": self.num_used_pages,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_output_tokens": self.num_output_tokens,
            "num_prefix_queries": self.num_prefix_queries,
            "num_prefix_hits": self.num_prefix_hits,
            "num_preemptions": self.num_preemptions,
            "num_steps": self.num_steps,
            "num_failed_steps": self.num_failed_steps,
            "steps_s": self.steps_s,
            "drafts": self.drafts.as_dict(),
            **{f"{name}_s": _as_dict(getattr(self, name)) for name in histograms},
            "step_tokens": _as_dict(self.step_tokens),
            "speculation": {
                "compared_s": self.compared_s if self.compared_s else None,
                "plain_s": self.plain_s if self.compared_s else None,
                "saved_s": self.saved_s,
                "speedup": self.speedup,
            },
            "draft_length": None if self.draft_length is None else self.draft_length.as_dict(),
        }


def _as_dict(histogram: Histogram) -> dict[str, object]:
    return {
        "count": histogram.count,
        "sum": histogram.sum,
        "mean": histogram.mean,
        "bounds": list(histogram.bounds),
        "counts": list(histogram.counts),
    }
