"""Stage 2, draft: the MTP layer proposes tokens.

Shapes: B scheduled sequences, K draft tokens (the most of any), V vocabulary, H hidden, T rows.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from specdec.batch import Extend, build_batch
from specdec.config import Recycling
from specdec.errors import ModelError
from specdec.kernels import DecoderOutput
from specdec.kernels.composed import Choose
from specdec.kernels.interface import DraftChain
from specdec.model.glm4_moe import Glm4MoeForCausalLM
from specdec.model.mtp import MTPLayer
from specdec.rng import Stream, uniforms
from specdec.sampling import greedy_tokens, sample, transform_logits
from specdec.scheduler import ScheduledSequence
from specdec.sequence import Sequence
from specdec.verify import point_masses


@dataclass(frozen=True)
class DraftResult:
    """Drafts of all scheduled sequences, as many as each was scheduled for.

    draft_probs is the distribution each draft was really drawn from (one-hot for a greedy draft), with rows to
    spare where a sequence has fewer than K; None where all drafts are greedy.
    """

    draft_token_ids: list[list[int]]  # [B] of up to K
    draft_probs: Tensor | None  # [B, K, V]


class Drafter(Protocol):
    """Proposes drafts; may write KV rows of uncommitted tokens, must not change a sequence."""

    def draft(self, scheduled: Seq[ScheduledSequence]) -> DraftResult:
        """Exactly `num_draft_tokens` drafts for each scheduled sequence."""
        ...


class NoDrafter:
    """For checkpoints without an MTP layer: never drafts."""

    def draft(self, scheduled: Seq[ScheduledSequence]) -> DraftResult:
        assert all(s.num_draft_tokens == 0 for s in scheduled), "drafts were scheduled without a drafter"
        return DraftResult([[] for _ in scheduled], None)


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
        token_ids: list[list[int]] = [[] for _ in scheduled]
        probs = self._room_for_probs(scheduled)
        # Longest chain first: the sequences still drafting at any step are a prefix of `order`.
        order = [b for b, s in enumerate(scheduled) if s.sequence.pending_hidden is not None]
        order.sort(key=lambda b: -scheduled[b].num_draft_tokens)
        if not order:
            return DraftResult(token_ids, None)
        last = self._extend([scheduled[b].sequence for b in order])
        drafting = [b for b in order if scheduled[b].num_draft_tokens > 0]
        if drafting:
            counts = [scheduled[b].num_draft_tokens for b in drafting]
            sequences = [scheduled[b].sequence for b in drafting]
            choose = None if probs is None else self._sampler(sequences, probs, drafting)
            chain = DraftChain(
                last=last,
                positions=[len(s.token_ids) - 2 for s in sequences],  # of the last pairs
                page_tables=[s.page_table for s in sequences],
                kv_cache=self.kv_cache.unsqueeze(0),
                counts=counts,
                recycle_unnormed=self.recycling == "pre_norm",
            )
            ids = self.mtp.decoder.draft_chain(self.target.head, chain, choose).tolist()
            for b, row, count in zip(drafting, ids, counts):
                token_ids[b] = _finite(row[:count])
        return DraftResult(token_ids, probs)

    def _sampler(self, sequences: Seq[Sequence], probs: Tensor, rows: list[int]) -> Choose:
        """Sampled drafts, whose distributions go to probs [B, K, V] at `rows`."""

        def choose(step: int, normed: Tensor) -> Tensor:
            logits = self.target.compute_logits(normed)
            tokens, probs[rows[: len(normed)], step] = sample_drafts(sequences[: len(normed)], logits, step)
            return tokens

        return choose

    def _room_for_probs(self, scheduled: Seq[ScheduledSequence]) -> Tensor | None:
        """[B, K, V] where a sequence samples its drafts."""
        if not any(s.sequence.samples_drafts for s in scheduled):
            return None
        kernels = self.target.kernels
        dtype = torch.promote_types(kernels.activation_dtype, torch.float32)
        most = max(s.num_draft_tokens for s in scheduled)
        return torch.zeros(len(scheduled), most, self.target.config.vocab_size, dtype=dtype, device=kernels.device)

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


def _finite(token_ids: list[int]) -> list[int]:
    if min(token_ids) < 0:
        raise ModelError("the MTP layer's logits are not finite: its weights are broken, or its dtype overflows")
    return token_ids


def sample_drafts(sequences: Seq[Sequence], logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Logits [B, V] of draft position `step` -> tokens [B] and the distributions they come from [B, V].

    Greedy requests, and greedy drafts of sampling ones, are point masses.
    """
    tokens = greedy_tokens(logits)
    probs = point_masses(tokens, logits)
    drawn = [b for b, s in enumerate(sequences) if s.samples_drafts]
    if drawn:
        starts = np.array([len(sequences[b].token_ids) for b in drawn])
        u = uniforms([sequences[b].seed for b in drawn], Stream.DRAFT, starts + step, starts)
        probs[drawn] = transform_logits(logits[drawn], [sequences[b].params for b in drawn])
        tokens[drawn] = sample(probs[drawn], torch.from_numpy(u).to(logits.device))
    return tokens, probs
