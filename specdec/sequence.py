"""`Sequence`: one request's tokens, cache rows and parameters. The only mutable per-request state.

Who sets what: the engine creates it; the scheduler gives and takes its pages; `specdec.commit` changes all
the rest. Draft and verify only read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from specdec.config import SamplingParams, SpeculationParams
from specdec.edits import RequestEdits
from specdec.kernels.interface import HiddenRows, LogitEdits
from specdec.logprobs import TokenLogprobs
from specdec.stats import SequenceStats
from specdec.text import OutputText

FinishReason = Literal["stop", "length", "abort"]
Rule = Literal["greedy", "coupled", "block", "token"]


@dataclass(eq=False)
class Sequence:
    """A request under way.

    token_ids: prompt and output. num_computed_tokens: tokens whose target KV rows are valid; always
    below len(token_ids) while it runs. num_mtp_tokens: committed pairs in the MTP layer's cache.
    pending_hidden, n rows: the target's hidden states of the computed tokens that have no MTP row yet,
    so num_mtp_tokens + n == num_computed_tokens while speculation is on; None while it is off.
    max_total_tokens: prompt and output together never exceed it. bad_words: as token ids. edits: what the parameters
    do to the next token's logits. logprobs: of the output's tokens.
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
    token_ids: list[int] = field(init=False)
    page_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_mtp_tokens: int = 0
    pending_hidden: HiddenRows | None = None
    finish_reason: FinishReason | None = None
    edits: RequestEdits | None = field(init=False)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stats: SequenceStats = field(default_factory=SequenceStats)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.edits = RequestEdits.of(self.params, self.bad_words, self.end_token_ids, self.prompt_token_ids)

    @property
    def rule(self) -> Rule:
        """Temperature 0 is greedy whatever the request's rule."""
        return "greedy" if self.params.greedy else self.speculation.verification

    @property
    def speculates(self) -> bool:
        return self.speculation.num_speculative_tokens > 0

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
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
