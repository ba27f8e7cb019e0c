"""What speculation did, per request: one home for every count and time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class SequenceStats:
    """Counts and times of one request.

    num_target_forwards: target forwards that decided a token of this request.
    num_drafts: those that verified at least one draft token. num_draft_tokens: draft tokens verified.
    num_accepted_tokens: accepted by the rule, before any stop condition cuts the output.
    drafted_per_position, accepted_per_position: the same by draft position, first to last.
    reached_per_position: drafts at that position whose predecessors were all accepted, so that
    accepted / reached is the conditional acceptance and accepted / drafted the unconditional one.
    num_first_tokens: output tokens of the first commit. num_cached_tokens: of the prompt, those whose rows the prefix
    cache had when the request was first admitted. num_preemptions: how often it lost its pages and computed its rows
    anew. *_s: seconds of time.perf_counter.
    """

    num_target_forwards: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    drafted_per_position: list[int] = field(default_factory=list)
    reached_per_position: list[int] = field(default_factory=list)
    accepted_per_position: list[int] = field(default_factory=list)
    num_output_tokens: int = 0
    num_first_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    arrival_s: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None
    last_token_s: float | None = None

    def record_verification(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        self.num_target_forwards += 1
        if num_draft_tokens == 0:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted_tokens
        for counts in (self.drafted_per_position, self.reached_per_position, self.accepted_per_position):
            counts += [0] * (num_draft_tokens - len(counts))
        for position in range(num_draft_tokens):
            self.drafted_per_position[position] += 1
            self.reached_per_position[position] += position <= num_accepted_tokens
            self.accepted_per_position[position] += position < num_accepted_tokens

    def record_tokens(self, num_tokens: int) -> None:
        now = time.perf_counter()
        if self.first_token_s is None:
            self.first_token_s, self.num_first_tokens = now, num_tokens
        self.last_token_s = now
        self.num_output_tokens += num_tokens

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens per verification, the recovered or bonus token included: 1 + accepted / verifications."""
        return None if self.num_drafts == 0 else 1 + self.num_accepted_tokens / self.num_drafts

    @property
    def ttft_s(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def decode_s(self) -> float:
        """Seconds from the first commit to the last one."""
        if self.first_token_s is None or self.last_token_s is None:
            return 0.0
        return self.last_token_s - self.first_token_s

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens after those of the first commit, per second of decoding."""
        return (self.num_output_tokens - self.num_first_tokens) / self.decode_s if self.decode_s > 0 else None

    def as_dict(self) -> dict[str, object]:
        return {
            "num_output_tokens": self.num_output_tokens,
            "num_target_forwards": self.num_target_forwards,
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "drafted_per_position": self.drafted_per_position,
            "reached_per_position": self.reached_per_position,
            "accepted_per_position": self.accepted_per_position,
            "mean_acceptance_length": self.mean_acceptance_length,
            "num_cached_tokens": self.num_cached_tokens,
            "num_preemptions": self.num_preemptions,
            "ttft_s": self.ttft_s,
            "decode_s": self.decode_s,
            "tokens_per_s": self.tokens_per_s,
        }
