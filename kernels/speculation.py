"""Drafts and verification out of single operations: what a backend's two calls of a step must equal.

Shapes: T packed tokens, B sequences, K draft tokens, R rows of logits, V vocabulary, H hidden.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import rules
from specdec.kernels.data import AttentionMetadata, DecoderOutput, HiddenRows
from specdec.kernels.decisions import (
    BLOCK_VERIFICATION,
    EXACT_MATCH,
    NOT_DRAFTED,
    NOT_FINITE,
    ChainSampling,
    DraftChain,
    Drafts,
    Verified,
    VerifyBatch,
    room_for_probs,
)
from specdec.kernels.operations import ComposedOperations, Operations


def draft_chain(
    kernels: ComposedOperations, decoder: Any, head: Any, chain: DraftChain, expert_ids: Tensor | None = None
) -> Drafts:
    """Computes `Backend.draft_chain` out of single operations; its parameters are described there."""
    metadata, num_pairs, num = chain.metadata, len(chain.input_ids), len(chain.counts)
    # 1) The pending pairs, whose hidden states are the target's own; draft 1 comes from each sequence's last one.
    traced = None if expert_ids is None else expert_ids[:, :num_pairs]
    output = kernels.decode(decoder, chain.input_ids, chain.previous, metadata, chain.kv_cache, traced)
    draws = _Draws(kernels, head, chain)
    active = [b for b, count in enumerate(chain.counts) if count > 0]
    ends = metadata.query_starts[1:]
    kept = [ends[b] - 1 for b in active]
    for step in range(max(chain.counts, default=0)):
        if not active:
            break
        output = DecoderOutput(output.normed[kept], output.unnormed[kept])
        if step > 0:
            # 2) One more row of each sequence that still drafts: the draft before, and the layer's own output for it.
            if expert_ids is not None:
                traced = expert_ids[:, num_pairs + (step - 1) * num :][:, : len(active)]
            recycled = output.unnormed if chain.recycle_unnormed else output.normed
            last = [draws.token_ids[b][-1] for b in active]
            rows = [HiddenRows(recycled, 0, len(last))]
            output = kernels.decode(decoder, last, rows, one_more_row(metadata, active, step), chain.kv_cache, traced)
        # 3) A token from each row. Where one is not finite the step is lost, so all chains end.
        ids = draws.draw(output.normed, step, active)
        if NOT_FINITE in ids:
            break
        kept = [i for i, b in enumerate(active) if ids[i] != NOT_DRAFTED and chain.counts[b] > step + 1]
        active = [active[i] for i in kept]
    return Drafts(draws.token_ids, draws.prob_rows, draws.probs)


def one_more_row(metadata: AttentionMetadata, sequences: list[int], step: int) -> AttentionMetadata:
    """Returns the metadata of one row of each of some sequences, `step` positions after the last one of `metadata`."""
    return AttentionMetadata(
        query_lens=[1] * len(sequences),
        kv_lens=[metadata.kv_lens[b] + step for b in sequences],
        page_tables=[metadata.page_tables[b] for b in sequences],
        page_size=metadata.page_size,
    )


class _Draws:
    """A chain's drafts so far, [B] of up to K, and the distributions that they were drawn from, where they are kept."""

    def __init__(self, kernels: ComposedOperations, head: Any, chain: DraftChain) -> None:
        self._kernels, self._head, self._sampling = kernels, head, chain.sampling
        self._num_steps = max(chain.counts, default=0)
        self.token_ids: list[list[int]] = [[] for _ in chain.counts]
        self.prob_rows = [-1] * len(chain.counts)
        self.probs: Tensor | None = None

    def draw(self, normed: Tensor, step: int, sequences: list[int]) -> list[int]:
        """Returns the next drafts [b] of some sequences with hidden states [b, H]; NOT_DRAFTED where a chain ends."""
        if self._sampling is None:
            ids = self._kernels.head_argmax(normed, self._head).tolist()
            ids = [NOT_FINITE if token < 0 else token for token in ids]
        else:
            ids = self._sampled(self._sampling, normed, step, sequences)
        for b, token in zip(sequences, ids):
            if token != NOT_DRAFTED:
                self.token_ids[b].append(token)
        return ids

    def _sampled(self, sampling: ChainSampling, normed: Tensor, step: int, sequences: list[int]) -> list[int]:
        kernels = self._kernels
        logits = compute_logits(kernels, normed, self._head)
        # The target's rows go through the same transform: that is why drafts are accepted under any parameters.
        kernels.edit_(logits, [sampling.edits[b] for b in sequences], [self.token_ids[b] for b in sequences])
        rows = sampling.rows.select(sequences, [step] * len(sequences))
        kernels.truncate_(logits, rows)
        ids = [NOT_FINITE if token < 0 else token for token in kernels.choose(logits, rows).tolist()]
        needed = [i for i, b in enumerate(sequences) if sampling.keep_probs[b] or sampling.min_confidence[b] > 0]
        if needed:
            probs = kernels.softmax(logits[needed], [rows.scales[i] for i in needed])
            self._keep(sampling, probs, step, [sequences[i] for i in needed])
            for i, confidence in zip(needed, probs.amax(-1).tolist()):
                # It looks at the distribution alone: a stop that looked at the token would bias what is accepted.
                if confidence < sampling.min_confidence[sequences[i]]:
                    ids[i] = NOT_DRAFTED
        return ids

    def _keep(self, sampling: ChainSampling, probs: Tensor, step: int, sequences: list[int]) -> None:
        """Keeps the distributions [b, V] of some sequences' next drafts, where they are wanted."""
        if self.probs is None and any(sampling.keep_probs):
            self.probs, self.prob_rows = room_for_probs(
                sampling.keep_probs, self._num_steps, probs.shape[-1], probs.dtype, probs.device
            )
        for b, distribution in zip(sequences, probs):
            if self.probs is not None and self.prob_rows[b] >= 0:
                self.probs[self.prob_rows[b], step] = distribution


def verify(
    kernels: ComposedOperations,
    decoder: Any,
    head: Any,
    input_ids: list[int],
    metadata: AttentionMetadata,
    kv_cache: Tensor,
    batch: VerifyBatch,
    expert_ids: Tensor | None = None,
) -> Verified:
    """Computes `Backend.verify` out of single operations; its parameters are described there."""
    hidden = kernels.decode(decoder, batch.place(input_ids), None, metadata, kv_cache, expert_ids).normed
    return decide(kernels, head, hidden, batch) if batch.rules else Verified(hidden, [], [])


def decide(kernels: Operations, head: Any, hidden: Tensor, batch: VerifyBatch) -> Verified:
    """Decides a batch whose drafts are on the host from the target's hidden states [T, H]."""
    drafts = batch.drafts.token_ids
    # 1) Rows of logits [R, V]: a sequence's rows follow each other, and row i of it comes after i drafts.
    rows = [(b, i) for b, row in enumerate(drafts) for i in range(len(row) + 1)]
    first = list(accumulate((len(row) + 1 for row in drafts), initial=0))  # of each sequence
    logits = compute_logits(kernels, hidden[[batch.first_rows[b] + i for b, i in rows]], head)
    raw = logits.clone() if batch.keep_logits else None
    # 2) The requests' own transforms, as of the tokens and drafts before each row.
    kernels.edit_(logits, [batch.edits[b] for b, _ in rows], [drafts[b][:i] for b, i in rows])
    sampling = batch.rows.select([b for b, _ in rows], [i for _, i in rows])
    kernels.truncate_(logits, sampling)
    # 3) Rules: the target's own choices where drafts need only equal them, distributions where drafts may be rejected.
    token_ids: list[list[int]] = [[] for _ in drafts]
    exact = [b for b, rule in enumerate(batch.rules) if rule == EXACT_MATCH]
    if exact:
        chosen = [row for b in exact for row in range(first[b], first[b + 1])]
        choices = iter(kernels.choose(logits[chosen], sampling.select(chosen)).tolist())
        for b in exact:
            token_ids[b] = rules.match_choices([next(choices) for _ in range(len(drafts[b]) + 1)], drafts[b])
    proposals = {b: _proposal(batch, b, first[b]) for b, rule in enumerate(batch.rules) if rule != EXACT_MATCH}
    if proposals:
        probs = kernels.softmax(logits, sampling.scales)
        emitted = rules.verify_by_rejection(kernels, probs, batch.drafts.probs, list(proposals.values()))
        for b, tokens in zip(proposals, emitted):
            token_ids[b] = tokens
    return Verified(hidden, token_ids, drafts, raw, logits if batch.keep_logits else None)


def _proposal(batch: VerifyBatch, b: int, first_row: int) -> rules.Proposal:
    """Returns sequence b's drafts as a rejection rule takes them; first_row: its first row of probabilities."""
    return rules.Proposal(
        draft_token_ids=batch.drafts.token_ids[b],
        first_row=first_row,
        prob_row=batch.drafts.prob_rows[b],
        block=batch.rules[b] == BLOCK_VERIFICATION,
        seed=batch.rows.seeds[b],
        start=batch.rows.positions[b],
    )


def compute_logits(kernels: Operations, hidden: Tensor, head: Any) -> Tensor:
    """Returns logits [R, V], in at least fp32, of hidden states [R, H] and a packed head [V, H]."""
    logits = kernels.linear(hidden, head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
