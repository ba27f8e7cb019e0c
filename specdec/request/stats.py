"""What speculation did and how long everything took: of one request here, of an engine in `specdec.metrics.engine`."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import dataclass, field, fields
from typing import NamedTuple


class DraftFigures:
    """Figures that follow from counts of verifications, of one request, an engine, or several added up."""

    outcomes: dict[tuple[int, int], int]
    """How many verifications of k draft tokens accepted a of them, by (k, a)."""

    def __add__(self, other: DraftFigures) -> DraftStats:
        """Returns the counts of both added up."""
        if not isinstance(other, DraftFigures):
            return NotImplemented
        total = DraftStats(dict(self.outcomes))
        for outcome, n in other.outcomes.items():
            total.outcomes[outcome] = total.outcomes.get(outcome, 0) + n
        return total

    def __radd__(self, start: int) -> DraftStats:
        """Returns 0 + these counts, with which `sum` begins."""
        return DraftStats() + self if start == 0 else NotImplemented

    @property
    def num_target_forwards(self) -> int:
        """Target forwards that decided a token of a request, counted once for each request."""
        return sum(self.outcomes.values())

    @property
    def num_drafts(self) -> int:
        """Verifications of at least one draft token."""
        return sum(n for (k, _), n in self.outcomes.items() if k)

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens verified."""
        return sum(n * k for (k, _), n in self.outcomes.items())

    @property
    def num_accepted_tokens(self) -> int:
        """Draft tokens accepted."""
        return sum(n * a for (_, a), n in self.outcomes.items())

    @property
    def drafted_per_position(self) -> list[int]:
        """Draft tokens verified, by draft position, first to last."""
        return self._per_position(lambda k, a, position: True)

    @property
    def reached_per_position(self) -> list[int]:
        """Draft tokens verified whose predecessors were all accepted, by draft position. accepted / reached is the
        conditional acceptance, accepted / drafted the unconditional one."""
        return self._per_position(lambda k, a, position: position <= a)

    @property
    def accepted_per_position(self) -> list[int]:
        """Draft tokens accepted, by draft position."""
        return self._per_position(lambda k, a, position: position < a)

    def _per_position(self, counts: Callable[[int, int, int], bool]) -> list[int]:
        most = max((k for k, _ in self.outcomes), default=0)
        return [
            sum(n for (k, a), n in self.outcomes.items() if position < k and counts(k, a, position))
            for position in range(most)
        ]

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens per verification, the recovered or bonus token included: 1 + accepted / verifications; None without
        any."""
        return None if self.num_drafts == 0 else 1 + self.num_accepted_tokens / self.num_drafts

    def as_dict(self) -> dict[str, object]:
        """Returns a document for JSON, see docs/json.md."""
        return {
            "num_target_forwards": self.num_target_forwards,
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "drafted_per_position": self.drafted_per_position,
            "reached_per_position": self.reached_per_position,
            "accepted_per_position": self.accepted_per_position,
            "mean_acceptance_length": self.mean_acceptance_length,
        }


@dataclass
class DraftStats(DraftFigures):
    """Counts of verifications; those of several add up: `sum((output.stats for output in outputs), DraftStats())`."""

    outcomes: dict[tuple[int, int], int] = field(default_factory=dict)
    """How many verifications of k draft tokens accepted a of them, by (k, a), before any stop condition cut the
    output."""

    def record_verification(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Counts one verification."""
        key = num_draft_tokens, num_accepted_tokens
        self.outcomes[key] = self.outcomes.get(key, 0) + 1


class CommitRecord(NamedTuple):
    """What one commit added to a request."""

    num_draft_tokens: int
    """Draft tokens verified."""
    num_accepted_tokens: int
    """Draft tokens accepted."""
    num_tokens: int
    """Tokens added to the output, which an end may have cut."""
    interval_s: float | None
    """Seconds since the request's commit before; None for the first one."""


class RequestFigures(DraftFigures):
    """Figures that follow from the counts and times of one request; `RequestStats` describes the fields."""

    num_output_tokens: int
    num_first_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    last_token_s: float | None

    @property
    def queue_s(self) -> float | None:
        """Seconds from arrival to the start of the first step that worked on the request; None before it."""
        return None if self.scheduled_s is None else self.scheduled_s - self.arrival_s

    @property
    def prefill_s(self) -> float | None:
        """Seconds from the first step that worked on the request to its first token; None before that."""
        if self.first_token_s is None or self.scheduled_s is None:
            return None
        return self.first_token_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """Seconds from arrival to the first token; None before it."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def decode_s(self) -> float:
        """Seconds from the first commit of tokens to the last one."""
        if self.first_token_s is None or self.last_token_s is None:
            return 0.0
        return self.last_token_s - self.first_token_s

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens after those of the first commit, per second of decoding; None without any."""
        return (self.num_output_tokens - self.num_first_tokens) / self.decode_s if self.decode_s > 0 else None

    def as_dict(self) -> dict[str, object]:
        """Returns a document for JSON, see docs/json.md."""
        return {
            "num_output_tokens": self.num_output_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_preemptions": self.num_preemptions,
            **super().as_dict(),
            "queue_s": self.queue_s,
            "prefill_s": self.prefill_s,
            "ttft_s": self.ttft_s,
            "decode_s": self.decode_s,
            "tokens_per_s": self.tokens_per_s,
        }


@dataclass
class SequenceStats(RequestFigures, DraftStats):
    """Counts and times of one request, kept up by the engine; `RequestStats`, a copy, describes the fields."""

    num_output_tokens: int = 0
    num_first_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    arrival_s: float = field(default_factory=time.perf_counter)
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    def record_commit(
        self, now: float, num_draft_tokens: int, num_accepted_tokens: int, num_tokens: int
    ) -> CommitRecord:
        """Counts a commit, and returns what it added.

        now: seconds of time.perf_counter.
        num_draft_tokens, num_accepted_tokens: of the verification.
        num_tokens: tokens of its outcome that the output kept, which an end may have cut.
        """
        interval_s = None if self.last_token_s is None else now - self.last_token_s
        if self.first_token_s is None:
            self.first_token_s, self.num_first_tokens = now, num_tokens
        self.last_token_s = now
        self.num_output_tokens += num_tokens
        self.record_verification(num_draft_tokens, num_accepted_tokens)
        return CommitRecord(num_draft_tokens, num_accepted_tokens, num_tokens, interval_s)


@dataclass(frozen=True)
class RequestStats(RequestFigures):
    """Counts and times of one request, as they were when its output was made. Points in time are seconds of
    time.perf_counter. Added up, several give the `DraftStats` of all."""

    outcomes: dict[tuple[int, int], int]
    """How many verifications of k draft tokens accepted a of them, by (k, a)."""
    num_output_tokens: int
    """Output tokens so far."""
    num_first_tokens: int
    """Output tokens of the first commit."""
    num_cached_tokens: int
    """Prompt tokens whose rows the prefix cache had when the request was first admitted."""
    num_preemptions: int
    """How often the request lost its pages and computed its rows anew."""
    arrival_s: float
    """When the request arrived."""
    scheduled_s: float | None
    """When the scheduler first gave it a place in a step; None before that."""
    first_token_s: float | None
    """When its first token was committed; None before that."""
    last_token_s: float | None
    """When its last token was committed; None before that."""

    @classmethod
    def of(cls, stats: SequenceStats) -> RequestStats:
        """Returns a copy of what the engine has recorded until now."""
        return cls(**{f.name: copy(getattr(stats, f.name)) for f in fields(cls)})


class Histogram:
    """Counts observations by size.

    bounds: [n], ascending.
    counts: [n + 1]; counts[i] observations lie above bounds[i - 1] and not above bounds[i], the last ones above all.
    sum: of all observations.
    """

    def __init__(self, bounds: Seq[float]) -> None:
        """bounds: [n], ascending."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts an observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """Mean of the observations; None without any."""
        return self.sum / self.count if self.count else None
