"""The larger operations out of the small ones: what a decoder computes, and what a fused kernel must equal.

Shapes: T packed tokens, H hidden, D head_dim, Hq/Hkv query/KV heads, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.interface import (
    NOT_DRAFTED,
    NOT_FINITE,
    AttentionMetadata,
    AttentionWeights,
    DecoderOutput,
    DecoderShape,
    DecoderWeights,
    DraftChain,
    DraftSampling,
    FusionWeights,
    Kernels,
    LayerWeights,
    MLPWeights,
    MoEWeights,
)

Edit = Callable[[list[int], Tensor, Tensor], None]
"""(sequences [b], their drafts so far [b, step], their logits [b, V]): changes the logits in place."""


def mlp(kernels: Kernels, x: Tensor, gate_up: Any, down: Any) -> Tensor:
    """See `Kernels.mlp`; for backends that do not rearrange gate and up."""
    return kernels.linear(kernels.silu_and_mul(kernels.linear(x, gate_up)), down)


def decode(
    kernels: Kernels,
    decoder: DecoderWeights,
    input_ids: Tensor,
    previous: Tensor | None,
    positions: Tensor,
    metadata: AttentionMetadata,
    kv_cache: Tensor,
    expert_ids: Tensor | None = None,
) -> DecoderOutput:
    """See `Kernels.decode`."""
    assert (previous is None) == (decoder.fusion is None), "previous hidden states and a fusion belong together"
    x = F.embedding(input_ids, decoder.embedding).to(kernels.activation_dtype)  # [T, H]
    if decoder.fusion is not None and previous is not None:
        x = _fuse(kernels, decoder.shape, decoder.fusion, x, previous)
    for i, layer in enumerate(decoder.layers):
        chosen = None if expert_ids is None else expert_ids[i]
        x = _layer(kernels, decoder, layer, x, positions, metadata, kv_cache[i], chosen)
    return DecoderOutput(kernels.rms_norm(x, decoder.norm, decoder.shape.rms_norm_eps), x)


def draft_chain(
    kernels: Kernels,
    decoder: Any,
    head: Any,
    chain: DraftChain,
    edit: Edit | None = None,
    expert_ids: Tensor | None = None,
) -> Tensor:
    """`Kernels.draft_chain`, with logits that may be edited before anything is drawn from them."""
    device, last = chain.kv_cache.device, chain.last
    drafts = torch.full((len(chain.counts), max(chain.counts)), NOT_DRAFTED, dtype=torch.int64, device=device)
    active = list(range(len(chain.counts)))
    for step in range(drafts.shape[1]):
        kept = [i for i, b in enumerate(active) if chain.counts[b] > step and (step == 0 or drafts[b, step - 1] >= 0)]
        active = [active[i] for i in kept]
        if not active:
            break
        last = DecoderOutput(last.normed[kept], last.unnormed[kept])
        if step > 0:
            at = [chain.positions[b] + step for b in active]
            metadata = _single_rows(at, [chain.page_tables[b] for b in active], chain.kv_cache)
            last = kernels.decode(
                decoder, drafts[active, step - 1], last.unnormed if chain.recycle_unnormed else last.normed,
                torch.tensor(at, device=device), metadata, chain.kv_cache,
                None if expert_ids is None else expert_ids[step - 1, :, : len(active)],
            )  # fmt: skip
        drafts[active, step] = _draw(kernels, head, chain.sampling, edit, last.normed, active, drafts[active, :step])
        if (drafts[active, step] == NOT_FINITE).any():
            break
    return drafts


def _draw(
    kernels: Kernels,
    head: Any,
    sampling: DraftSampling | None,
    edit: Edit | None,
    normed: Tensor,
    sequences: list[int],
    drafts: Tensor,
) -> Tensor:
    """Hidden states [b, H] of some of the chain's sequences, and their drafts [b, step] -> the next drafts [b]."""
    if sampling is None:
        ids = kernels.head_argmax(normed, head)
        return ids.where(ids >= 0, NOT_FINITE)
    step = drafts.shape[1]
    logits = kernels.linear(normed, head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if edit is not None:
        edit(sequences, drafts, logits)
    rows = sampling.rows.select(sequences, advance=step)
    kernels.truncate_(logits, rows)
    ids = kernels.choose(logits, rows)
    ids = ids.where(ids >= 0, NOT_FINITE)
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


def _single_rows(positions: list[int], page_tables: list[list[int]], kv_cache: Tensor) -> AttentionMetadata:
    """One row per sequence, at the given positions."""
    size = kv_cache.shape[3]
    slots = [table[at // size] * size + at % size for at, table in zip(positions, page_tables)]
    return AttentionMetadata(
        query_lens=[1] * len(positions),
        kv_lens=[at + 1 for at in positions],
        page_tables=page_tables,
        slot_mapping=torch.tensor(slots, device=kv_cache.device),
    )


def _fuse(kernels: Kernels, shape: DecoderShape, fusion: FusionWeights, embeds: Tensor, previous: Tensor) -> Tensor:
    eps = shape.rms_norm_eps
    pair = [kernels.rms_norm(embeds, fusion.enorm, eps), kernels.rms_norm(previous, fusion.hnorm, eps)]
    return kernels.linear(torch.cat(pair, -1), fusion.eh_proj)


def _layer(
    kernels: Kernels,
    decoder: DecoderWeights,
    layer: LayerWeights,
    x: Tensor,
    positions: Tensor,
    metadata: AttentionMetadata,
    kv_cache: Tensor,
    expert_ids: Tensor | None,
) -> Tensor:
    eps = decoder.shape.rms_norm_eps
    normed = kernels.rms_norm(x, layer.input_norm, eps)
    attended = _attention(kernels, decoder, layer.attention, normed, positions, metadata, kv_cache)
    normed, x = kernels.add_rms_norm(attended, x, layer.post_attention_norm, eps)
    if isinstance(layer.mlp, MLPWeights):
        return x + kernels.mlp(normed, layer.mlp.gate_up, layer.mlp.down)
    return x + _mixture(kernels, decoder.shape, layer.mlp, normed, expert_ids)


def _attention(
    kernels: Kernels,
    decoder: DecoderWeights,
    weights: AttentionWeights,
    x: Tensor,
    positions: Tensor,
    metadata: AttentionMetadata,
    kv_cache: Tensor,
) -> Tensor:
    """GQA with optional bias and qk-norm; RoPE on the first rotary_dim dims of each head."""
    shape = decoder.shape
    heads = kernels.linear(x, weights.qkv, weights.qkv_bias).view(x.shape[0], -1, shape.head_dim)  # [T, Hq + 2 Hkv, D]
    q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
    if weights.q_norm is not None and weights.k_norm is not None:
        q = kernels.rms_norm(q, weights.q_norm, shape.rms_norm_eps)
        k = kernels.rms_norm(k, weights.k_norm, shape.rms_norm_eps)
    kernels.rope_(q, k, positions, decoder.cos_sin)
    kernels.append_kv(k, v, kv_cache, metadata.slot_mapping)
    return kernels.linear(kernels.paged_attention(q, kv_cache, metadata).flatten(1), weights.o)


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
