"""The larger operations out of the small ones: what a decoder computes, and what a fused kernel must equal.

Shapes: T packed tokens, H hidden, D head_dim, Hq/Hkv query/KV heads, E experts, k experts per token.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels import rules
from specdec.kernels.interface import (
    BLOCK_VERIFICATION,
    EXACT_MATCH,
    NOT_DRAFTED,
    NOT_FINITE,
    AttentionMetadata,
    AttentionWeights,
    DecoderOutput,
    DecoderShape,
    DecoderWeights,
    DraftChain,
    Drafts,
    DraftSampling,
    FusionWeights,
    HiddenRows,
    Kernels,
    LayerWeights,
    MLPWeights,
    MoEWeights,
    Verification,
    Verified,
)


def mlp(kernels: Kernels, x: Tensor, gate_up: Any, down: Any) -> Tensor:
    """See `Kernels.mlp`; for backends that do not rearrange gate and up."""
    return kernels.linear(kernels.silu_and_mul(kernels.linear(x, gate_up)), down)


class ForwardInputs(NamedTuple):
    """What a forward reads, where the kernels read it. previous [T, H]: the states that a fusion takes. attention: what
    the kernels' `paged_attention` takes for metadata."""

    tokens: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T]
    previous: Tensor | None
    attention: Any


def decode(
    kernels: Kernels,
    decoder: DecoderWeights,
    input_ids: list[int],
    previous: list[HiddenRows] | None,
    metadata: AttentionMetadata,
    kv_cache: Tensor,
    expert_ids: Tensor | None = None,
) -> DecoderOutput:
    """See `Kernels.decode`."""
    tokens, positions, slots = torch.tensor([input_ids, metadata.positions, metadata.slots], device=kv_cache.device)
    states = None if previous is None else torch.cat([rows.tensor() for rows in previous])
    return forward(kernels, decoder, ForwardInputs(tokens, positions, slots, states, metadata), kv_cache, expert_ids)


def forward(
    kernels: Kernels,
    decoder: DecoderWeights,
    inputs: ForwardInputs,
    kv_cache: Tensor,
    expert_ids: Tensor | None = None,
) -> DecoderOutput:
    """`decode` from inputs that are in place."""
    assert (inputs.previous is None) == (decoder.fusion is None), "previous hidden states and a fusion belong together"
    x = F.embedding(inputs.tokens, decoder.embedding).to(kernels.activation_dtype)  # [T, H]
    if decoder.fusion is not None and inputs.previous is not None:
        x = _fuse(kernels, decoder.shape, decoder.fusion, x, inputs.previous)
    for i, layer in enumerate(decoder.layers):
        x = _layer(kernels, decoder, layer, x, inputs, kv_cache[i], None if expert_ids is None else expert_ids[i])
    return DecoderOutput(kernels.rms_norm(x, decoder.norm, decoder.shape.rms_norm_eps), x)


def draft_chain(
    kernels: Kernels, decoder: Any, head: Any, chain: DraftChain, expert_ids: Tensor | None = None
) -> Drafts:
    """See `Kernels.draft_chain`."""
    metadata, num_pairs = chain.metadata, len(chain.input_ids)
    chosen = None if expert_ids is None else expert_ids[:, :num_pairs]
    output = kernels.decode(decoder, chain.input_ids, chain.previous, metadata, chain.kv_cache, chosen)
    drafts: list[list[int]] = [[] for _ in chain.counts]
    active = [b for b, count in enumerate(chain.counts) if count > 0]
    ends = list(accumulate(metadata.query_lens))
    kept = [ends[b] - 1 for b in active]
    for step in range(max(chain.counts, default=0)):
        if not active:
            break
        output = DecoderOutput(output.normed[kept], output.unnormed[kept])
        if step > 0:
            if expert_ids is not None:
                chosen = expert_ids[:, num_pairs + (step - 1) * len(drafts) :][:, : len(active)]
            recycled = output.unnormed if chain.recycle_unnormed else output.normed
            one_more = AttentionMetadata(
                [1] * len(active),
                [metadata.kv_lens[b] + step for b in active],
                [metadata.page_tables[b] for b in active],
                metadata.page_size,
            )
            last = [drafts[b][-1] for b in active]
            output = kernels.decode(
                decoder, last, [HiddenRows(recycled, 0, len(last))], one_more, chain.kv_cache, chosen
            )
        ids = _draw(kernels, head, chain.sampling, output.normed, active, [drafts[b] for b in active])
        for b, token in zip(active, ids):
            if token != NOT_DRAFTED:
                drafts[b].append(token)
        if NOT_FINITE in ids:
            break
        kept = [i for i, b in enumerate(active) if ids[i] >= 0 and chain.counts[b] > step + 1]
        active = [active[i] for i in kept]
    return Drafts(drafts)


def _draw(
    kernels: Kernels,
    head: Any,
    sampling: DraftSampling | None,
    normed: Tensor,
    sequences: list[int],
    drafts: list[list[int]],
) -> list[int]:
    """Hidden states [b, H] of some of the chain's sequences, and their drafts [b] so far -> the next drafts [b]."""
    if sampling is None:
        return [NOT_FINITE if token < 0 else token for token in kernels.head_argmax(normed, head).tolist()]
    step = len(drafts[0])
    logits = compute_logits(kernels, normed, head)
    kernels.edit_(logits, [sampling.edits[b] for b in sequences], drafts)
    rows = sampling.rows.select(sequences, [step] * len(sequences))
    kernels.truncate_(logits, rows)
    ids = [NOT_FINITE if token < 0 else token for token in kernels.choose(logits, rows).tolist()]
    needed = [i for i, b in enumerate(sequences) if sampling.prob_rows[b] >= 0 or sampling.min_confidence[b] > 0]
    if needed:
        probs = kernels.softmax(logits[needed], [rows.scales[i] for i in needed])
        for i, law, confidence in zip(needed, probs, probs.amax(-1).tolist()):
            b = sequences[i]
            if sampling.probs is not None and sampling.prob_rows[b] >= 0:
                sampling.probs[sampling.prob_rows[b], step] = law
            if confidence < sampling.min_confidence[b]:
                ids[i] = NOT_DRAFTED
    return ids


def verify(
    kernels: Kernels,
    decoder: Any,
    head: Any,
    input_ids: list[int],
    metadata: AttentionMetadata,
    kv_cache: Tensor,
    verification: Verification,
    expert_ids: Tensor | None = None,
) -> Verified:
    """See `Kernels.verify`."""
    hidden = kernels.decode(decoder, input_ids, None, metadata, kv_cache, expert_ids).normed
    return decide(kernels, head, hidden, verification) if verification.rules else Verified(hidden, [], None, None)


def decide(kernels: Kernels, head: Any, hidden: Tensor, v: Verification) -> Verified:
    """What follows the target's hidden states [T, H], from drafts on the host."""
    num_rows = [len(drafts) + 1 for drafts in v.drafts]
    of = [b for b, n in enumerate(num_rows) for _ in range(n)]  # the sequence of each row
    after = [i for n in num_rows for i in range(n)]  # how many drafts before it
    logits = compute_logits(kernels, hidden[[v.first_rows[b] + i for b, i in zip(of, after)]], head)
    raw = logits.clone() if v.keep_logits else None
    kernels.edit_(logits, [v.edits[b] for b in of], [v.drafts[b][:i] for b, i in zip(of, after)])
    rows = v.rows.select(of, after)
    kernels.truncate_(logits, rows)
    first = list(accumulate(num_rows, initial=0))
    exact = [b for b, rule in enumerate(v.rules) if rule == EXACT_MATCH]
    drawn = [b for b, rule in enumerate(v.rules) if rule != EXACT_MATCH]
    token_ids: list[list[int]] = [[] for _ in v.drafts]
    if exact:
        chosen = [first[b] + i for b in exact for i in range(num_rows[b])]
        choices = iter(kernels.choose(logits[chosen], rows.select(chosen)).tolist())
        for b in exact:
            token_ids[b] = rules.match_choices([next(choices) for _ in range(num_rows[b])], v.drafts[b])
    if drawn:
        probs = kernels.softmax(logits, rows.scales)
        proposals = [
            rules.Proposal(
                v.drafts[b],
                first[b],
                v.prob_rows[b],
                v.rules[b] == BLOCK_VERIFICATION,
                v.rows.seeds[b],
                v.rows.positions[b],
            )
            for b in drawn
        ]
        for b, tokens in zip(drawn, rules.verify_by_rejection(kernels, probs, v.draft_probs, proposals)):
            token_ids[b] = tokens
    return Verified(hidden, token_ids, raw, logits if v.keep_logits else None)


def compute_logits(kernels: Kernels, hidden: Tensor, head: Any) -> Tensor:
    """hidden [R, H], packed head [V, H] -> logits [R, V] in at least fp32."""
    logits = kernels.linear(hidden, head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _fuse(kernels: Kernels, shape: DecoderShape, fusion: FusionWeights, embeds: Tensor, previous: Tensor) -> Tensor:
    eps = shape.rms_norm_eps
    pair = [kernels.rms_norm(embeds, fusion.enorm, eps), kernels.rms_norm(previous, fusion.hnorm, eps)]
    return kernels.linear(torch.cat(pair, -1), fusion.eh_proj)


def _layer(
    kernels: Kernels,
    decoder: DecoderWeights,
    layer: LayerWeights,
    x: Tensor,
    inputs: ForwardInputs,
    kv_cache: Tensor,
    expert_ids: Tensor | None,
) -> Tensor:
    eps = decoder.shape.rms_norm_eps
    normed = kernels.rms_norm(x, layer.input_norm, eps)
    attended = _attention(kernels, decoder, layer.attention, normed, inputs, kv_cache)
    normed, x = kernels.add_rms_norm(attended, x, layer.post_attention_norm, eps)
    if isinstance(layer.mlp, MLPWeights):
        return x + kernels.mlp(normed, layer.mlp.gate_up, layer.mlp.down)
    return x + _mixture(kernels, decoder.shape, layer.mlp, normed, expert_ids)


def _attention(
    kernels: Kernels,
    decoder: DecoderWeights,
    weights: AttentionWeights,
    x: Tensor,
    inputs: ForwardInputs,
    kv_cache: Tensor,
) -> Tensor:
    """GQA with optional bias and qk-norm; RoPE on the first rotary_dim dims of each head."""
    shape = decoder.shape
    heads = kernels.linear(x, weights.qkv, weights.qkv_bias).view(x.shape[0], -1, shape.head_dim)  # [T, Hq + 2 Hkv, D]
    q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
    if weights.q_norm is not None and weights.k_norm is not None:
        q = kernels.rms_norm(q, weights.q_norm, shape.rms_norm_eps)
        k = kernels.rms_norm(k, weights.k_norm, shape.rms_norm_eps)
    kernels.rope_(q, k, inputs.positions, decoder.cos_sin)
    kernels.append_kv(k, v, kv_cache, inputs.slots)
    return kernels.linear(kernels.paged_attention(q, kv_cache, inputs.attention).flatten(1), weights.o)


def _mixture(
    kernels: Kernels, shape: DecoderShape, weights: MoEWeights, x: Tensor, expert_ids: Tensor | None
) -> Tensor:
    """Routed experts plus the unscaled shared ones."""
    logits = kernels.linear(x.to(weights.correction_bias.dtype), weights.router)  # [T, E]
    ids, expert_weights = kernels.route(logits, weights.correction_bias, shape.routing)
    if expert_ids is not None:
        expert_ids.copy_(ids)
    routed = kernels.moe(x, ids, expert_weights, weights.experts.gate_up, weights.experts.down)
    return routed + kernels.mlp(x, weights.shared.gate_up, weights.shared.down)
