"""Weights in the form that the C++ kernels read, and the decoders made of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specdec.kernels.cpu import native
from specdec.kernels.data import DecoderWeights, LayerWeights, MLPWeights, RoutingConfig

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
LANES = 16


def blocks(size: int) -> int:
    return -(-size // LANES)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A matrix, or a stack of E of them, in the form that the C++ kernels read: sixteen outputs side by side."""

    shape: tuple[int, ...]
    """The shape before packing, (out, in) or (E, out, in)."""
    data: Tensor
    """[ceil(out / 16)][in][16] values per matrix, in the packed dtype."""
    scales: Tensor | None
    """[ceil(out / 16) * 16] fp32 per matrix, one for each output; None unless the dtype is int8."""
    num_outputs: int
    """Outputs as the kernels see them, which for gate and up projections are both halves padded to whole blocks."""

    @cached_property
    def unbiased(self) -> native.Matrix:
        return self.matrix()

    def matrix(self, bias: Tensor | None = None) -> native.Matrix:
        return native.Matrix(
            self.data.data_ptr(), None if self.scales is None else self.scales.data_ptr(),
            None if bias is None else bias.data_ptr(), self.num_outputs, self.shape[-1], DTYPES[self.data.dtype],
        )  # fmt: skip


def pack(library: ctypes.CDLL, weight: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Packs weight [out, in] or [E, out, in], in any floating dtype, in `dtype`; quantises it if that is int8."""
    return _pack(library, weight, dtype, weight.shape[-2], lambda matrix: matrix)


def pack_gate_up(library: ctypes.CDLL, weight: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Packs weight [2I, H] or [E, 2I, H], gate rows first, as blocks of sixteen rows of gate and up in turns."""
    both, size_in = weight.shape[-2:]
    width, padded = both // 2, blocks(both // 2) * LANES

    def take_turns(matrix: Tensor) -> Tensor:
        halves = matrix.new_zeros(2, padded, size_in)
        halves[:, :width] = matrix.view(2, width, size_in)
        return halves.view(2, -1, LANES, size_in).transpose(0, 1).reshape(2 * padded, size_in)

    return _pack(library, weight, dtype, 2 * padded, take_turns)


def _pack(
    library: ctypes.CDLL, weight: Tensor, dtype: torch.dtype, out: int, arrange: Callable[[Tensor], Tensor]
) -> PackedWeight:
    """Packs each matrix of `weight` as `arrange` lays it out, with `out` rows."""
    size_in = weight.shape[-1]
    matrices = weight.reshape(-1, *weight.shape[-2:])
    data = torch.zeros(len(matrices), blocks(out) * LANES * size_in, dtype=dtype)
    scales = torch.zeros(len(matrices), blocks(out) * LANES) if dtype == torch.int8 else None
    for i, matrix in enumerate(matrices):
        arranged = arrange(matrix)
        if scales is not None:
            arranged, scales[i, :out] = quantise(arranged)
        arranged = arranged.to(dtype).contiguous()
        library.sd_pack(arranged.data_ptr(), DTYPES[dtype], out, size_in, data[i].data_ptr())
    return PackedWeight(tuple(weight.shape), data, scales, out)


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns q, int8 [out, in], and fp32 scales [out] of a matrix [out, in]: matrix ~ scale * q, |q| <= 127, rounded
    to nearest."""
    wide = matrix.float()
    scales = wide.abs().amax(-1) / 127
    return (wide / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round().to(torch.int8), scales


def mlp_struct(gate_up: PackedWeight, down: PackedWeight) -> native.MLP:
    return native.MLP(gate_up.matrix(), down.matrix())


def routing_struct(config: RoutingConfig, num_experts: int) -> native.Routing:
    return native.Routing(
        num_experts, config.num_experts_per_tok, config.n_group, config.topk_group, config.norm_topk_prob,
        config.routed_scaling_factor,
    )  # fmt: skip


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _layer_struct(weights: LayerWeights) -> native.Layer:
    attention = weights.attention
    layer = native.Layer(
        input_norm=weights.input_norm.data_ptr(),
        post_attention_norm=weights.post_attention_norm.data_ptr(),
        q_norm=address(attention.q_norm),
        k_norm=address(attention.k_norm),
        qkv=attention.qkv.matrix(attention.qkv_bias),
        o=attention.o.matrix(),
    )
    if isinstance(weights.mlp, MLPWeights):
        layer.mlp = mlp_struct(weights.mlp.gate_up, weights.mlp.down)
    else:
        shared, experts = weights.mlp.shared, weights.mlp.experts
        layer.mlp = mlp_struct(shared.gate_up, shared.down)
        layer.experts = mlp_struct(experts.gate_up, experts.down)
        layer.router, layer.correction_bias = weights.mlp.router.matrix(), weights.mlp.correction_bias.data_ptr()
    return layer


def cache_struct(kv_cache: Tensor) -> native.Cache:
    """Returns the structure of one layer's cache [pages, 2, page_size, Hkv, D], or of the first layer of several."""
    assert kv_cache.is_contiguous()
    return native.Cache(kv_cache.data_ptr(), DTYPES[kv_cache.dtype], *kv_cache.shape[-3:])


class PreparedDecoder:
    """A decoder's structures, with the weights that they point into."""

    def __init__(self, weights: DecoderWeights) -> None:
        self._bound: tuple[Tensor, native.Cache, int] | None = None
        self.weights, self.hidden_size = weights, weights.embedding.shape[1]
        self._layers = (native.Layer * len(weights.layers))(*map(_layer_struct, weights.layers))
        shape, fusion = weights.shape, weights.fusion
        self.struct = native.Decoder(
            embedding=weights.embedding.data_ptr(),
            embedding_dtype=DTYPES[weights.embedding.dtype],
            hidden=self.hidden_size,
            heads=shape.num_heads,
            kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rotary_dim=weights.cos_sin.shape[1],
            eps=shape.rms_norm_eps,
            cos_sin=weights.cos_sin.data_ptr(),
            layers=self._layers,
            num_layers=len(weights.layers),
            routing=routing_struct(shape.routing, shape.num_experts),
            norm=weights.norm.data_ptr(),
        )
        if fusion is not None:
            self.struct.enorm, self.struct.hnorm = fusion.enorm.data_ptr(), fusion.hnorm.data_ptr()
            self.struct.eh_proj = fusion.eh_proj.matrix()

    def bind(self, kv_cache: Tensor) -> tuple[native.Cache, int]:
        """Returns the structure of a cache [layers, pages, 2, page_size, Hkv, D] and the number of elements from one
        layer to the next; remembers them for the cache that was asked for last."""
        if self._bound is None or self._bound[0] is not kv_cache:
            self._bound = kv_cache, cache_struct(kv_cache), kv_cache.stride(0)
        return self._bound[1:]
