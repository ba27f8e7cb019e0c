"""Stage 2, draft: the MTP layer proposes tokens.

Shapes: B scheduled sequences, K draft tokens (the most of any), V vocabulary, H hidden, T rows.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from specdec.batch import Extend, build_batch
from specdec.config import Recycling
from specdec.edits import LogitRow, edit_logits_
from specdec.errors import ModelError
from specdec.kernels import DecoderOutput
from specdec.kernels.composed import Edit
from specdec.kernels.interface import GREEDY, NOT_DRAFTED, NOT_FINITE, DraftChain, DraftSampling
from specdec.model.glm4_moe import Glm4MoeForCausalLM
from specdec.model.mtp import MTPLayer
from specdec.rng import Stream
from specdec.sampling import SampledRows, draft_stream, row_sampling
from specdec.scheduler import ScheduledSequence
from specdec.sequence import Sequence


@dataclass(frozen=True)
class DraftResult:
    """Drafts of all scheduled sequences, at most as many as each was scheduled for.

    draft_probs[prob_rows[b], i]: the law that draft i of sequence b was really drawn from. prob_rows[b] = -1: its
    drafts are point masses, or its rule needs no laws.
    """

    draft_token_ids: list[list[int]]  # [B] of up to K
    prob_rows: list[int]  # [B]
    draft_probs: Tensor | None = None  # [Q, K, V]

    @classmethod
    def nothing(cls, scheduled: Seq[ScheduledSequence]) -> DraftResult:
        return cls([[] for _ in scheduled], [-1] * len(scheduled))


class Drafter(Protocol):
    """Proposes drafts; may write KV rows of uncommitted tokens, must not change a sequence."""

    def draft(self, scheduled: Seq[ScheduledSequence]) -> DraftResult:
        """Up to `num_draft_tokens` drafts for each scheduled sequence; fewer only where its own
        min_draft_confidence ended them."""
        ...


class NoDrafter:
    """For checkpoints without an MTP layer: never drafts."""

    def draft(self, scheduled: Seq[ScheduledSequence]) -> DraftResult:
        assert all(s.num_draft_tokens == 0 for s in scheduled), "drafts were scheduled without a drafter"
        return DraftResult.nothing(scheduled)


class MTPDrafter:
    """Extends the MTP cache by the pairs committed last, then drafts a chain of up to K tokens.

    Pair i is (hidden of token i, token i+1); it lives at position i and predicts token i+2. The extend
    has the target's true hidden states and overwrites the rows that earlier drafting wrote; draft 1
    comes from its last row. Each later step feeds back the layer's own output and the draft before it.
    """

    def __init__(
        self, target: Glm4MoeForCausalLM, mtp: MTPLayer, kv_cache: Tensor, page_size: int, recycling: Recycling
    ) -> None:
        self.target, self.mtp, self.kv_cache, self.page_size = target, mtp, kv_cache, page_size
        self.recycling = recycling

    def draft(self, scheduled: Seq[ScheduledSequence]) -> DraftResult:
        result = DraftResult.nothing(scheduled)
        extended = [b for b, s in enumerate(scheduled) if s.sequence.pending_hidden is not None]
        if not extended:
            return result
        last = self._extend([scheduled[b].sequence for b in extended])
        kept = [i for i, b in enumerate(extended) if scheduled[b].num_draft_tokens > 0]
        if not kept:
            return result
        if len(kept) < len(extended):
            last = DecoderOutput(last.normed[kept], last.unnormed[kept])
        drafting = [extended[i] for i in kept]
        sequences = [scheduled[b].sequence for b in drafting]
        chain = self._chain(sequences, [scheduled[b].num_draft_tokens for b in drafting], last)
        edit = _editor(sequences) if any(s.edits_logits for s in sequences) else None
        ids = self.mtp.decoder.draft_chain(self.target.head, chain, edit).tolist()
        for i, b in enumerate(drafting):
            result.draft_token_ids[b] = _drafted(ids[i])
            result.prob_rows[b] = -1 if chain.sampling is None else chain.sampling.prob_rows[i]
        return result if chain.sampling is None else replace(result, draft_probs=chain.sampling.probs)

    def _chain(self, sequences: list[Sequence], counts: list[int], last: DecoderOutput) -> DraftChain:
        return DraftChain(
            last=last,
            positions=[len(s.token_ids) - 2 for s in sequences],  # of the last pairs
            page_tables=[s.page_table for s in sequences],
            kv_cache=self.kv_cache.unsqueeze(0),
            counts=counts,
            recycle_unnormed=self.recycling == "pre_norm",
            sampling=self._sampling(sequences, max(counts)),
        )

    def _sampling(self, sequences: list[Sequence], num_steps: int) -> DraftSampling | None:
        """How the chain draws, and room for the laws that rejection rules need; None where it takes every argmax."""
        streams = [draft_stream(s) for s in sequences]
        confidences = [s.speculation.min_draft_confidence for s in sequences]
        edits = any(s.edits_logits for s in sequences)
        if not edits and not any(confidences) and all(stream == GREEDY for stream in streams):
            return None
        num_rows = streams.count(Stream.DRAFT)
        numbers = iter(range(num_rows))
        prob_rows = [next(numbers) if stream == Stream.DRAFT else -1 for stream in streams]
        kernels = self.target.kernels
        dtype = torch.promote_types(kernels.activation_dtype, torch.float32)
        shape = (num_rows, num_steps, self.target.config.vocab_size)
        probs = torch.empty(shape, dtype=dtype, device=kernels.device) if num_rows else None
        rows = row_sampling(SampledRows(s, stream, len(s.token_ids)) for s, stream in zip(sequences, streams))
        return DraftSampling(rows, confidences, probs, prob_rows)

    def _extend(self, sequences: Seq[Sequence]) -> DecoderOutput:
        """Runs the pending pairs of every sequence, with true hidden states -> the last row of each, [B, H]."""
        hidden = [pending for s in sequences if (pending := s.pending_hidden) is not None]
        extends = []
        for s, rows in zip(sequences, hidden, strict=True):
            first = s.num_mtp_tokens
            extends.append(Extend(s.token_ids[first + 1 : first + 1 + len(rows)], first, s.page_table))
        batch = build_batch(extends, self.page_size, self.kv_cache.device)
        previous = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        output = self.mtp.draft(previous, batch.input_ids, batch.positions, batch.metadata, self.kv_cache)
        if len(extends) == 1:
            return DecoderOutput(output.normed[-1:], output.unnormed[-1:])
        last = [start + extend_len - 1 for start, extend_len in zip(batch.row_starts, batch.metadata.query_lens)]
        return DecoderOutput(output.normed[last], output.unnormed[last])


def _editor(sequences: Seq[Sequence]) -> Edit:
    def edit(chosen: list[int], drafts: Tensor, logits: Tensor) -> None:
        edit_logits_(logits, [LogitRow(sequences[b], before) for b, before in zip(chosen, drafts.tolist())])

    return edit


def _drafted(token_ids: list[int]) -> list[int]:
    """The drafts of one sequence, without what was not drafted."""
    if NOT_FINITE in token_ids:
        raise ModelError("the MTP layer's logits are not finite: its weights are broken, or its dtype overflows")
    return token_ids[: token_ids.index(NOT_DRAFTED)] if NOT_DRAFTED in token_ids else token_ids
