"""The operations a backend offers, with one signature each.

Shapes: T packed tokens (ragged over sequences), B sequences, D head_dim, Hq/Hkv query/KV heads,
H hidden, I expert width, E experts, k experts per token, V vocabulary. A KV cache of one layer is
`[num_pages, 2, page_size, Hkv, D]`, keys first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedPages:
    """int64 on the CPU: query_starts, page_starts [B + 1], kv_lens [B], and all page tables in one row."""

    query_starts: Tensor
    kv_lens: Tensor
    page_starts: Tensor
    pages: Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the packed tokens of one forward live in the paged cache.

    Sequence b contributes `query_lens[b]` tokens, the last of its `kv_lens[b]` cached ones, so
    `kv_lens` includes the tokens being attended: keys and values are appended first.
    """

    query_lens: list[int]  # [B], sum = T
    kv_lens: list[int]  # [B], kv_lens >= query_lens
    page_tables: list[list[int]]  # [B], at least ceil(kv_len / page_size) pages each
    slot_mapping: Tensor  # [T] int64: page * page_size + offset of each token

    @cached_property
    def packed(self) -> PackedPages:
        """The lists as tensors, made once for all layers of a forward."""
        return PackedPages(
            query_starts=torch.tensor([0, *accumulate(self.query_lens)]),
            kv_lens=torch.tensor(self.kv_lens),
            page_starts=torch.tensor([0, *accumulate(map(len, self.page_tables))]),
            pages=torch.tensor([page for table in self.page_tables for page in table]),
        )


@dataclass(frozen=True)
class RoutingConfig:
    """How a router chooses experts (Glm4Moe: sigmoid scores, bias-corrected grouped top-k)."""

    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


class Kernels(Protocol):
    """A backend: chosen once by `specdec.kernels.select`, then called without further questions.

    dtype: of the matrices. activation_dtype: of everything else that flows through the model, biases and
    norm weights included. cache_dtypes: what a KV cache may be stored in.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    activation_dtype: torch.dtype
    cache_dtypes: tuple[torch.dtype, ...]

    def pack(self, weight: Tensor) -> Any:
        """A matrix [out, in], or a stack [E, out, in], in the form that `linear` and `moe` of this backend read."""
        ...

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """x [T, in], packed weight [out, in], bias [out] -> [T, out]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., D], weight [D] -> x / rms(x) * weight, the mean of squares in at least fp32."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """-> (rms_norm(x + residual), x + residual); the inputs are not changed."""
        ...

    def rope_(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """Rotates in place the first `rotary_dim` dims of q [T, Hq, D] and k [T, Hkv, D], half-split.

        positions [T] int64; cos_sin [max_positions, rotary_dim] fp32: cosines, then sines.
        """
        ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2I], gate first -> silu(gate) * up [T, I]."""
        ...

    def route(self, router_logits: Tensor, correction_bias: Tensor, config: RoutingConfig) -> tuple[Tensor, Tensor]:
        """router_logits [T, E] fp32, correction_bias [E] fp32 -> expert ids [T, k] int64, weights [T, k] fp32.

        The bias decides the choice only; the weights are the plain sigmoid scores.
        """
        ...

    def moe(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Any, down: Any) -> Tensor:
        """x [T, H], ids and weights [T, k], packed gate_up [E, 2I, H] and down [E, H, I] -> [T, H].

        A row's contributions are added in ascending expert id.
        """
        ...

    def append_kv(self, k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Writes k, v [T, Hkv, D] into the slots [T] int64 of one layer's cache."""
        ...

    def paged_attention(self, q: Tensor, kv_cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        """q [T, Hq, D] -> [T, Hq, D]: causal, scale D^-0.5, softmax in at least fp32.

        Query i of sequence b sits at position kv_lens[b] - query_lens[b] + i and sees the keys up to it.
        Cache slots beyond kv_lens are never read.
        """
        ...
