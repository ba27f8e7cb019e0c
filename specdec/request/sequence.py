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
from specdec.kernels.data import HiddenRows
from specdec.kernels.decisions import LogitEdits
from specdec.request.logit_edits import RequestEdits
from specdec.request.logprobs import TokenLogprobs
from specdec.request.stats import SequenceStats
from specdec.request.text import OutputText

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]
Rule = Literal["greedy", "coupled", "block", "token"]


@dataclass(eq=False)
class Sequence:
    """A request under way."""

    request_id: str
    """The request's id."""
    prompt_token_ids: list[int]
    """The prompt's tokens."""
    params: SamplingParams
    """How it is sampled and when it ends."""
    speculation: SpeculationParams
    """How it drafts and verifies."""
    seed: int
    """Key of all its random numbers."""
    max_total_tokens: int
    """The most tokens of prompt and output together."""
    end_token_ids: frozenset[int]
    """Tokens that end it."""
    output: OutputText
    """The output's text."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of token ids that must not come about."""
    priority: int = 0
    """Lower ones run first, equal ones in order of arrival."""
    leader: Sequence | None = None
    """Sample 0 of the same prompt, whose pages this one will share; None for sample 0 itself."""
    has_mtp: bool = True
    """Whether the engine drafts with the MTP layer."""
    arrival: int = 0
    """Number in the order of arrival, which the scheduler sets."""
    rule: Rule = field(init=False)
    """The verification rule; temperature 0 is greedy whatever was asked for."""
    speculates: bool = field(init=False)
    """Whether it drafts; never a request of one token, which is decided without drafts."""
    uses_mtp: bool = field(init=False)
    """Whether the MTP layer works for it."""
    num_prompt_tokens: int = field(init=False)
    """Number of the prompt's tokens."""
    token_ids: list[int] = field(init=False)
    """Committed tokens, prompt and output."""
    page_table: list[int] = field(default_factory=list)
    """Its pages, in order; empty while it waits."""
    num_published_pages: int = 0
    """Number of its pages, the first ones, that the prefix cache knows."""
    num_computed_tokens: int = 0
    """Tokens whose target KV rows are valid; always below len(token_ids) while it runs."""
    num_mtp_tokens: int = 0
    """Committed pairs in the MTP layer's cache."""
    pending_hidden: list[HiddenRows] = field(default_factory=list)
    """The target's hidden states of the computed tokens that have no MTP row yet, in order, in any number of pieces.
    Their rows and num_mtp_tokens sum to num_computed_tokens where the MTP layer works for it; empty elsewhere."""
    finish_reason: FinishReason | None = None
    """Why it has ended; None before that."""
    error: Exception | None = None
    """What ended it, where finish_reason is "error"."""
    edits: RequestEdits | None = field(init=False)
    """What the parameters do to the next token's logits; None where they ask for nothing."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Log-probabilities of the output's tokens, where they are asked for."""
    stats: SequenceStats = field(default_factory=SequenceStats)
    """Counts and times."""

    def __post_init__(self) -> None:
        self.rule = "greedy" if self.params.greedy else self.speculation.verification
        self.token_ids, self.num_prompt_tokens = list(self.prompt_token_ids), len(self.prompt_token_ids)
        limit = self.max_total_tokens - self.num_prompt_tokens
        self.speculates = limit > 1 and self.speculation.max_draft_tokens > 0
        self.uses_mtp = self.speculates and self.has_mtp
        self.edits = RequestEdits.of(self.params, self.bad_words, self.end_token_ids, self.prompt_token_ids)

    def admit(self, pages: list[int], num_cached_pages: int, page_size: int) -> None:
        """Makes the sequence run on `pages`, of which the first `num_cached_pages` come from the prefix cache with
        target and MTP rows already computed."""
        self.page_table, self.num_published_pages = pages, num_cached_pages
        self.num_computed_tokens = num_cached_pages * page_size
        self.num_mtp_tokens = self.num_computed_tokens if self.uses_mtp else 0
        if self.stats.num_preemptions == 0:
            self.stats.num_cached_tokens = self.num_computed_tokens
            self.stats.scheduled_s = time.perf_counter()

    def preempt(self) -> list[int]:
        """Makes the sequence wait again, and returns its pages; tokens, text and statistics stay."""
        self.num_computed_tokens = self.num_mtp_tokens = 0
        self.pending_hidden = []
        self.stats.num_preemptions += 1
        return self.give_up_pages()

    def give_up_pages(self) -> list[int]:
        """Detaches and returns the sequence's pages, on preemption or at its end."""
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
        """What requests are sorted by: they run in ascending order of it."""
        return self.priority, self.arrival

    @property
    def num_pending_pairs(self) -> int:
        """Number of pairs that have no MTP row yet: rows of `pending_hidden`."""
        return self.num_computed_tokens - self.num_mtp_tokens if self.pending_hidden else 0

    @property
    def samples_drafts(self) -> bool:
        """Whether drafts are drawn from the MTP layer's distribution; greedy ones are point masses."""
        return not self.params.greedy and self.speculation.draft_sampling == "sampled"

    @property
    def logit_edits(self) -> LogitEdits | None:
        """Edits of the row that decides the next token; None where there is nothing to do."""
        return None if self.edits is None else self.edits.current

    @property
    def output_token_ids(self) -> list[int]:
        """Committed tokens after the prompt."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """Number of committed tokens after the prompt."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Committed tokens that have no target KV row yet."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens to compute after admission before decoding starts. For a request preempted while drafting this leaves
        out the last token: it is computed with its drafts, so iterations start where they would have without the
        preemption."""
        return len(self.token_ids) - (self.speculates and self.num_output_tokens > 0)

    @property
    def num_final_rows(self) -> int:
        """Rows of committed tokens that nothing overwrites any more, in the MTP layer's cache as well if it works."""
        return self.num_mtp_tokens if self.uses_mtp else min(self.num_computed_tokens, len(self.token_ids) - 1)

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None
