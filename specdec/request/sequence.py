"""`Sequence`: one request's tokens, cache rows and parameters. The only mutable per-request state.

Who sets what:

- the engine creates it, and ends it with `end` where it does not end by itself;
- the scheduler numbers it (`arrival`), gives and takes its pages (`admit`, `preempt`, `give_up_pages`), and with them
  the rows that are in them, publishes full pages, and stamps what belongs to this in `stats`: scheduled_s,
  num_cached_tokens, num_preemptions;
- `specdec.step.commit` changes all the rest: tokens, computed rows, pending hidden states, text, log-probabilities, the
  other statistics, and the end that tokens bring.

Draft, verify and the engine's statistics only read it.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field
from typing import Literal

from specdec.config import SamplingParams, SpeculationParams
from specdec.kernels.data import HiddenRows, LogitEdits
from specdec.request.logit_edits import RequestEdits
from specdec.request.logprobs import TokenLogprobs
from specdec.request.stats import SequenceStats
from specdec.request.text import OutputText

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]
Rule = Literal["greedy", "coupled", "block", "token"]


@dataclass(eq=False)
class Sequence:
    """A request under way.

    token_ids: prompt and output. num_computed_tokens: tokens whose target KV rows are valid; always
    below len(token_ids) while it runs. num_mtp_tokens: committed pairs in the MTP layer's cache.
    pending_hidden: the target's hidden states of the computed tokens that have no MTP row yet, in order, in any
    number of pieces; num_mtp_tokens and their rows sum to num_computed_tokens where the MTP layer works for it. Empty
    elsewhere.
    max_total_tokens: prompt and output together never exceed it. bad_words: as token ids. edits: what the parameters
    do to the next token's logits. logprobs: of the output's tokens. priority: lower ones first, equal ones in order of
    arrival, which the scheduler sets. leader: another sample of the same prompt, whose pages this one will share.
    num_published_pages: of page_table, the first ones that the prefix cache knows. error: what ended it, where
    finish_reason is "error". rule: temperature 0 is greedy whatever was asked for. speculates: whether it drafts; never
    a request of one token, which is decided without drafts. has_mtp: whether the engine drafts with the MTP layer.
    uses_mtp: whether that layer works for it.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    speculation: SpeculationParams
    seed: int
    max_total_tokens: int
    end_token_ids: frozenset[int]
    output: OutputText
    bad_words: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    leader: Sequence | None = None
    has_mtp: bool = True
    arrival: int = 0
    rule: Rule = field(init=False)
    speculates: bool = field(init=False)
    uses_mtp: bool = field(init=False)
    num_prompt_tokens: int = field(init=False)
    token_ids: list[int] = field(init=False)
    page_table: list[int] = field(default_factory=list)
    num_published_pages: int = 0
    num_computed_tokens: int = 0
    num_mtp_tokens: int = 0
    pending_hidden: list[HiddenRows] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    edits: RequestEdits | None = field(init=False)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stats: SequenceStats = field(default_factory=SequenceStats)

    def __post_init__(self) -> None:
        self.rule = "greedy" if self.params.greedy else self.speculation.verification
        self.token_ids, self.num_prompt_tokens = list(self.prompt_token_ids), len(self.prompt_token_ids)
        limit = self.max_total_tokens - self.num_prompt_tokens
        self.speculates = limit > 1 and self.speculation.max_draft_tokens > 0
        self.uses_mtp = self.speculates and self.has_mtp
        self.edits = RequestEdits.of(self.params, self.bad_words, self.end_token_ids, self.prompt_token_ids)

    def admit(self, pages: list[int], num_cached_pages: int, page_size: int) -> None:
        """It runs from now on. The first pages are the prefix cache's: their rows are computed, the MTP layer's too."""
        self.page_table, self.num_published_pages = pages, num_cached_pages
        self.num_computed_tokens = num_cached_pages * page_size
        self.num_mtp_tokens = self.num_computed_tokens if self.uses_mtp else 0
        if self.stats.num_preemptions == 0:
            self.stats.num_cached_tokens = self.num_computed_tokens
            self.stats.scheduled_s = time.perf_counter()

    def preempt(self) -> list[int]:
        """It waits again; tokens, text and statistics stay. -> its pages."""
        self.num_computed_tokens = self.num_mtp_tokens = 0
        self.pending_hidden = []
        self.stats.num_preemptions += 1
        return self.give_up_pages()

    def give_up_pages(self) -> list[int]:
        """Of a request that is preempted or has ended."""
        pages, self.page_table, self.num_published_pages = self.page_table, [], 0
        return pages

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """Ends the request; the tokens that it has stay.

        error: what ended it, with reason "error". Without an error the text that was held back comes out; a stop string
        in it turns the reason "length" into "stop". Raises what decoding that text raises; the request has not ended
        then.
        """
        if error is not None:
            traceback.clear_frames(error.__traceback__)  # which the request keeps, but not a step's tensors
        elif self.output.flush() and reason == "length":
            reason = "stop"
        self.finish_reason, self.error, self.pending_hidden = reason, error, []

    @property
    def order(self) -> tuple[int, int]:
        """Requests run in ascending order of it."""
        return self.priority, self.arrival

    @property
    def num_pending_pairs(self) -> int:
        """Rows of `pending_hidden`."""
        return self.num_computed_tokens - self.num_mtp_tokens if self.pending_hidden else 0

    @property
    def samples_drafts(self) -> bool:
        """Drafts are drawn from the MTP layer's distribution; greedy ones are point masses."""
        return not self.params.greedy and self.speculation.draft_sampling == "sampled"

    @property
    def logit_edits(self) -> LogitEdits | None:
        """Of the next token's row; None where there is nothing to do."""
        return None if self.edits is None else self.edits.current

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens to compute on admission, before it decodes. The last token of a request that was preempted while it
        drafted waits for its drafts, as it did before: where iterations start does not depend on preemption."""
        return len(self.token_ids) - (self.speculates and self.num_output_tokens > 0)

    @property
    def num_final_rows(self) -> int:
        """Rows of committed tokens that nothing overwrites any more, those of the MTP layer included if it works."""
        return self.num_mtp_tokens if self.uses_mtp else min(self.num_computed_tokens, len(self.token_ids) - 1)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
