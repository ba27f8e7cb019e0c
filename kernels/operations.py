"""The single operations: what a decoder, a chain of drafts and a verification are made of.

`specdec.kernels.reference` has each of them in plain torch, the executable specification; backends have their own,
which the tests compare with it one by one. `specdec.kernels.decoder` and `specdec.kernels.speculation` put them
together.

Shapes: T packed tokens, R rows of logits, D head_dim, Hq/Hkv query/KV heads, H hidden, I expert width, E experts,
k experts per token, V vocabulary. A KV cache of one layer is `[num_pages, 2, page_size, Hkv, D]`, keys first.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from specdec.kernels.data import (
    AttentionMetadata,
    DecoderOutput,
    HiddenRows,
    LogitEdits,
    Residuals,
    RoutingConfig,
    RowSampling,
)


@runtime_checkable
class Operations(Protocol):
    """One signature for each operation, on tensors of `device`; matrices are packed, see `Backend.pack`."""

    device: torch.device
    activation_dtype: torch.dtype

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """x [T, in], packed weight [out, in], bias [out] -> [T, out]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., D], weight [D] -> x / rms(x) * weight, the mean of squares in at least fp32."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """-> (rms_norm(x + residual), x + residual), perhaps in the memory of x and residual."""
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

    def mlp(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        """x [T, H], gate_up by `pack_gate_up`, packed down -> down(silu(gate(x)) * up(x)) [T, H]."""
        ...

    def moe(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Any, down: Any) -> Tensor:
        """x [T, H], ids and weights [T, k], stacks of gate_up by `pack_gate_up` and packed down -> [T, H].

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

    def head_argmax(self, x: Tensor, head: Any) -> Tensor:
        """x [R, H], packed head [V, H] -> ids [R] int64: argmax of the logits, the lowest id among equals,
        -1 where a logit is not finite."""
        ...

    def edit_(self, logits: Tensor, edits: list[LogitEdits | None], drafts: list[list[int]]) -> None:
        """logits [R, V], contiguous, in at least fp32; edits and the drafts before a row [R]: in place."""
        ...

    def truncate_(self, logits: Tensor, sampling: RowSampling) -> None:
        """logits [R, V], contiguous, in at least fp32: tokens outside each row's distribution become -inf, in place. A
        row with a NaN or +inf, or without a finite logit, becomes NaN throughout."""
        ...

    def choose(self, logits: Tensor, sampling: RowSampling) -> Tensor:
        """logits [R, V] after `truncate_` -> ids [R] int64, the lowest among equals: the argmax, or with noise that of
        scale * logits + Gumbel noise, which is a sample of softmax(scale * logits). -1 for a row with a NaN or +inf, or
        without a finite logit.

        Token v takes word v % 4 of the Philox call with counter (v // 4, position, start, stream) and
        G = -log(-log((word + 1/2) / 2^32)).
        """
        ...

    def softmax(self, logits: Tensor, scales: list[float]) -> Tensor:
        """logits [R, V] -> softmax(scale * logits) [R, V]; -inf becomes 0."""
        ...

    def residual_mass(self, laws: Residuals) -> list[float]:
        """[n]: the sum of each law, in fp64."""
        ...

    def sample_residual(self, laws: Residuals, uniforms: list[float]) -> list[int]:
        """[n]: a token of each law by inverse CDF in fp64, from numbers in [0, 1). A law without mass gives a token of
        p[p_rows_i]. -1 where the sum is not finite."""
        ...

    def uniforms(self, seeds: list[int], stream: int, positions: list[int], starts: list[int]) -> list[float]:
        """[n] in [0, 1): 53 bits of the first two words of the Philox call (0, position, start, stream)."""
        ...


class ComposedOperations(Operations, Protocol):
    """Operations that run whole decoders as well, so that drafts and verification can be made of them."""

    def decode(
        self,
        decoder: Any,
        input_ids: list[int],
        previous: list[HiddenRows] | None,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        expert_ids: Tensor | None = None,
    ) -> DecoderOutput:
        """See `Backend.decode`."""
        ...


def operations_of(backend: object) -> Operations:
    """The single operations of a backend, for measurements that repeat parts of a step. Raises TypeError where it has
    none of its own."""
    if not isinstance(backend, Operations):
        raise TypeError(f"{type(backend).__name__} runs whole decoders only, it has no single operations")
    return backend
