"""Stage 2, draft: the MTP layer proposes tokens.

Shapes: B scheduled sequences, K draft tokens (the most of any), V vocabulary, H hidden, T rows.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from specdec.config import Recycling
from specdec.errors import ModelError, RowsError
from specdec.kernels.interface import GREEDY, NOT_FINITE, DraftChain, DraftSampling
from specdec.model.glm4_moe import Glm4MoeForCausalLM
from specdec.model.mtp import MTPLayer
from specdec.request.seeds import Stream
from specdec.step.batch import Extend, build_batch
from specdec.step.sampling import draft_stream, row_sampling
from specdec.step.scheduler import ScheduledSequence


@dataclass(frozen=True)
class DraftResult:
    """Drafts of all scheduled sequences, at most as many as each was scheduled for.

    draft_probs[prob_rows[b], i]: the law that draft i of sequence b was really drawn from. prob_rows[b] = -1: its
    drafts are point masses, or its rule needs no laws. on_device [D, K]: where it is given, the ids of sequence b are
    row device_rows[b] of it, padded, and draft_token_ids has as many zeros as there may be.
    """

    draft_token_ids: list[list[int]]  # [B] of up to K
    prob_rows: list[int]  # [B]
    draft_probs: Tensor | None = None  # [Q, K, V]
    on_device: Tensor | None = None
    device_rows: list[int] = field(default_factory=list)  # [B]; -1: no drafts

    @classmethod
    def nothing(cls, scheduled: Seq[ScheduledSequence]) -> DraftResult:
        return cls([[] for _ in scheduled], [-1] * len(scheduled), device_rows=[-1] * len(scheduled))


def check_finite(draft_token_ids: list[list[int]]) -> None:
    """Raises RowsError of the sequences for which the MTP layer's logits were not finite."""
    broken = [b for b, token_ids in enumerate(draft_token_ids) if NOT_FINITE in token_ids]
    if broken:
        raise RowsError(broken, ModelError.not_finite("the MTP layer"))


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
        self.target, self.mtp, self.page_size, self.recycling = target, mtp, page_size, recycling
        self.kv_cache = kv_cache.unsqueeze(0)

    def draft(self, scheduled: Seq[ScheduledSequence]) -> DraftResult:
        result = DraftResult.nothing(scheduled)
        extended = [b for b, s in enumerate(scheduled) if s.extends_mtp]
        if not extended:
            return result
        chain = self._chain([scheduled[b] for b in extended])
        sampling = chain.sampling
        drafts = self.mtp.decoder.draft_chain(self.target.head, chain)
        for i, (b, token_ids) in enumerate(zip(extended, drafts.token_ids)):
            result.draft_token_ids[b], result.device_rows[b] = token_ids, i
            result.prob_rows[b] = -1 if sampling is None else sampling.prob_rows[i]
        check_finite(result.draft_token_ids)
        probs = None if sampling is None else sampling.probs
        return replace(result, draft_probs=probs, on_device=drafts.on_device)

    def _chain(self, scheduled: list[ScheduledSequence]) -> DraftChain:
        """The pending pairs, with true hidden states, and how many drafts follow the last one of each sequence."""
        extends, pending = [], []
        for s in scheduled:
            sequence, first = s.sequence, s.sequence.num_mtp_tokens
            tokens = sequence.token_ids[first + 1 : sequence.num_computed_tokens + 1]
            extends.append(Extend(tokens, first, sequence.page_table))
            pending += sequence.pending_hidden
        batch = build_batch(extends, self.page_size)
        return DraftChain(
            input_ids=batch.input_ids,
            previous=pending,
            metadata=batch.metadata,
            kv_cache=self.kv_cache,
            counts=[s.num_draft_tokens for s in scheduled],
            recycle_unnormed=self.recycling == "pre_norm",
            sampling=self._sampling(scheduled),
        )

    def _sampling(self, scheduled: list[ScheduledSequence]) -> DraftSampling | None:
        """How the chain draws, and room for the laws that rejection rules need; None where it takes every argmax."""
        sequences = [s.sequence for s in scheduled]
        streams = [draft_stream(s) for s in sequences]
        confidences = [s.speculation.min_draft_confidence for s in sequences]
        edits = [s.logit_edits for s in sequences]
        if not any(edits) and not any(confidences) and all(stream == GREEDY for stream in streams):
            return None
        needed = [
            stream == Stream.DRAFT and s.num_draft_tokens > 0 for stream, s in zip(streams, scheduled, strict=True)
        ]
        kernels, num_rows = self.target.kernels, sum(needed)
        numbers = iter(range(num_rows))
        dtype = torch.promote_types(kernels.activation_dtype, torch.float32)
        shape = (num_rows, max(s.num_draft_tokens for s in scheduled), self.target.config.vocab_size)
        return DraftSampling(
            rows=row_sampling(sequences, streams),
            edits=edits,
            min_confidence=confidences,
            probs=torch.empty(shape, dtype=dtype, device=kernels.device) if num_rows else None,
            prob_rows=[next(numbers) if need else -1 for need in needed],
        )
