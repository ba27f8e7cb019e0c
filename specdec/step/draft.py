"""Stage 2, draft: the MTP layer proposes tokens. `specdec.step.drafter` has the stage for drafters of a user's own.

Shapes: B scheduled sequences, K draft tokens (the most of any).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from torch import Tensor

from specdec.config import Recycling
from specdec.kernels.decisions import GREEDY, ChainSampling, DraftChain, Drafts
from specdec.model.glm4_moe import Glm4MoeForCausalLM
from specdec.model.mtp import MTPLayer
from specdec.request.seeds import Stream
from specdec.step.batch import Extend, build_batch
from specdec.step.sampling import draft_stream, row_sampling
from specdec.step.scheduler import ScheduledSequence


class DraftStage(Protocol):
    """Proposes drafts; may write KV rows of uncommitted tokens, must not change a sequence."""

    def draft(self, scheduled: Seq[ScheduledSequence]) -> Drafts:
        """Returns the drafts of all scheduled sequences, [B], in their order.

        At most `num_draft_tokens` each, which is 0 for prompts that are still being computed. Raises RowsError where
        it fails for some of them and knows for which.
        """
        ...


class NoDrafts:
    """The draft stage of an engine that decodes plainly, for want of an MTP layer."""

    def draft(self, scheduled: Seq[ScheduledSequence]) -> Drafts:
        assert all(s.num_draft_tokens == 0 for s in scheduled), "drafts were scheduled without a drafter"
        return Drafts.of([[] for _ in scheduled])


class MTPDrafts:
    """The draft stage of an engine that drafts with the MTP layer.

    Extends the MTP cache by the pairs committed last, then drafts a chain of up to K tokens.

    Pair i is (hidden of token i, token i+1); it lives at position i and predicts token i+2. The extend
    has the target's true hidden states and overwrites the rows that earlier drafting wrote; draft 1
    comes from its last row. Each later step feeds back the layer's own output and the draft before it.
    """

    def __init__(
        self, target: Glm4MoeForCausalLM, mtp: MTPLayer, kv_cache: Tensor, page_size: int, recycling: Recycling
    ) -> None:
        self.target, self.mtp, self.page_size, self.recycling = target, mtp, page_size, recycling
        self.kv_cache = kv_cache.unsqueeze(0)

    def draft(self, scheduled: Seq[ScheduledSequence]) -> Drafts:
        extended = [b for b, s in enumerate(scheduled) if s.extends_mtp]
        if not extended:
            return Drafts.of([[] for _ in scheduled])
        drafts = self.mtp.decoder.draft_chain(self.target.head, self._chain([scheduled[b] for b in extended]))
        if len(extended) == len(scheduled):
            return drafts
        place = {b: i for i, b in enumerate(extended)}
        return drafts.select([place.get(b, -1) for b in range(len(scheduled))])

    def _chain(self, scheduled: list[ScheduledSequence]) -> DraftChain:
        """Returns the pending pairs, with true hidden states, and how many drafts follow each sequence's last one."""
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

    def _sampling(self, scheduled: list[ScheduledSequence]) -> ChainSampling | None:
        """Returns how the chain draws; None where every draft is the argmax."""
        sequences = [s.sequence for s in scheduled]
        streams = [draft_stream(s) for s in sequences]
        confidences = [s.speculation.min_draft_confidence for s in sequences]
        edits = [s.logit_edits for s in sequences]
        if not any(edits) and not any(confidences) and all(stream == GREEDY for stream in streams):
            return None
        return ChainSampling(
            rows=row_sampling(sequences, streams),
            edits=edits,
            min_confidence=confidences,
            # Noise of their own means that a rejection rule decides, which needs to know what drafts were drawn from.
            keep_probs=[stream == Stream.DRAFT and s.num_draft_tokens > 0 for stream, s in zip(streams, scheduled)],
        )
