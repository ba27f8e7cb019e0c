"""What a decoder computes, out of single operations; the C++ kernels run the same as one call.

The architecture is GLM-4.5's (`Glm4MoeForCausalLM` in transformers). `specdec.model.layers` has the weights,
under a checkpoint's names; the mathematics is here.

Shapes: T packed tokens, H hidden, D head_dim, Hq/Hkv query/KV heads, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.data import (
    AttentionMetadata,
    AttentionWeights,
    DecoderOutput,
    DecoderShape,
    DecoderWeights,
    FusionWeights,
    HiddenRows,
    LayerWeights,
    MLPWeights,
    MoEWeights,
)
from specdec.kernels.operations import Operations


def gated_mlp(kernels: Operations, x: Tensor, gate_up: Any, down: Any) -> Tensor:
    """Computes `Operations.mlp`, for backends that do not rearrange gate and up."""
    return kernels.linear(kernels.silu_and_mul(kernels.linear(x, gate_up)), down)


class ForwardInputs(NamedTuple):
    """What a forward reads, on the kernels' device."""

    tokens: Tensor
    """[T]: token ids."""
    positions: Tensor
    """[T]: each token's position in its sequence."""
    slots: Tensor
    """[T]: each token's place in the cache, see `AttentionMetadata.slots`."""
    previous: Tensor | None
    """[T, H]: the hidden states that a fusion takes; None without one."""
    attention: Any
    """What the kernels' `paged_attention` takes as its metadata."""


def run_decoder(
    kernels: Operations,
    decoder: DecoderWeights,
    input_ids: list[int],
    previous: list[HiddenRows] | None,
    metadata: AttentionMetadata,
    kv_cache: Tensor,
    expert_ids: Tensor | None = None,
) -> DecoderOutput:
    """Computes `Backend.decode` for decoders that are not prepared; its parameters are described there."""
    tokens, positions, slots = torch.tensor([input_ids, metadata.positions, metadata.slots], device=kv_cache.device)
    states = None if previous is None else torch.cat([rows.tensor() for rows in previous])
    return run_layers(kernels, decoder, ForwardInputs(tokens, positions, slots, states, metadata), kv_cache, expert_ids)


def run_layers(
    kernels: Operations,
    decoder: DecoderWeights,
    inputs: ForwardInputs,
    kv_cache: Tensor,
    expert_ids: Tensor | None = None,
) -> DecoderOutput:
    """Runs embedding, fusion (MTP layer), layers and final norm over inputs that are on the device.

    kv_cache: [layers, pages, 2, page_size, Hkv, D], which is appended to.
    expert_ids: [layers, T, k] int64, filled with every row's choices where a layer has experts; None for none.
    """
    assert (inputs.previous is None) == (decoder.fusion is None), "previous hidden states and a fusion belong together"
    x = F.embedding(inputs.tokens, decoder.embedding).to(kernels.activation_dtype)  # [T, H]
    if decoder.fusion is not None and inputs.previous is not None:
        x = _fuse(kernels, decoder.shape, decoder.fusion, x, inputs.previous)
    for i, layer in enumerate(decoder.layers):
        x = _layer(kernels, decoder, layer, x, inputs, kv_cache[i], None if expert_ids is None else expert_ids[i])
    return DecoderOutput(kernels.rms_norm(x, decoder.norm, decoder.shape.rms_norm_eps), x)


def _fuse(kernels: Operations, shape: DecoderShape, fusion: FusionWeights, embeds: Tensor, previous: Tensor) -> Tensor:
    eps = shape.rms_norm_eps
    pair = [kernels.rms_norm(embeds, fusion.enorm, eps), kernels.rms_norm(previous, fusion.hnorm, eps)]
    return kernels.linear(torch.cat(pair, -1), fusion.eh_proj)


def _layer(
    kernels: Operations,
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
    kernels: Operations,
    decoder: DecoderWeights,
    weights: AttentionWeights,
    x: Tensor,
    inputs: ForwardInputs,
    kv_cache: Tensor,
) -> Tensor:
    """Computes grouped-query attention (Ainslie et al. 2023) with optional bias and qk-norm, and RoPE (Su et al. 2021)
    on the first rotary_dim dims of each head."""
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
    kernels: Operations, shape: DecoderShape, weights: MoEWeights, x: Tensor, expert_ids: Tensor | None
) -> Tensor:
    """Computes the routed experts plus the unscaled shared ones."""
    logits = kernels.linear(x.to(weights.correction_bias.dtype), weights.router)  # [T, E]
    ids, expert_weights = kernels.route(logits, weights.correction_bias, shape.routing)
    if expert_ids is not None:
        expert_ids.copy_(ids)
    routed = kernels.moe(x, ids, expert_weights, weights.experts.gate_up, weights.experts.down)
    return routed + kernels.mlp(x, weights.shared.gate_up, weights.shared.down)
