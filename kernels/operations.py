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

from specdec.kernels.data import AttentionMetadata, DecoderOutput, HiddenRows, RoutingConfig
from specdec.kernels.decisions import LogitEdits, Residuals, RowSampling


@runtime_checkable
class Operations(Protocol):
    """One signature for each operation, on tensors of `device`; matrices are packed, see `Backend.pack`."""

    device: torch.device
    """Where all tensors are."""
    activation_dtype: torch.dtype
    """Dtype of what flows through the model."""

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Returns x W^T + bias, [T, out], of x [T, in], packed weight [out, in], bias [out]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Returns x / rms(x) * weight of x [..., D], weight [D]; the mean of squares is taken in at least fp32."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Returns (rms_norm(x + residual), x + residual), perhaps in the memory of x and residual, both [T, H]."""
        ...

    def rope_(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """Rotates in place the first `rotary_dim` dims of q [T, Hq, D] and k [T, Hkv, D], half-split.

        positions: [T] int64.
        cos_sin: [max_positions, rotary_dim] fp32, cosines, then sines.
        """
        ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """Returns silu(gate) * up, [T, I], of gate_up [T, 2I], the gate first."""
        ...

    def route(self, router_logits: Tensor, correction_bias: Tensor, config: RoutingConfig) -> tuple[Tensor, Tensor]:
        """Chooses experts: returns their ids [T, k] int64 and weights [T, k] fp32.

        The bias takes part in the choice only; the weights come from the plain sigmoid scores.

        router_logits: [T, E] fp32.
        correction_bias: [E] fp32.
        config: how many are chosen, and from which groups.
        """
        ...

    def mlp(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        """Returns down(silu(gate(x)) * up(x)), [T, H], of x [T, H], gate_up from `pack_gate_up`, packed down."""
        ...

    def moe(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Any, down: Any) -> Tensor:
        """Returns each row's weighted sum of its experts' outputs, [T, H], added in ascending expert id.

        x: [T, H].
        expert_ids, expert_weights: [T, k], from `route`.
        gate_up: stack [E, 2I, H] from `pack_gate_up`.
        down: packed stack [E, H, I].
        """
        ...

    def append_kv(self, k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Writes k, v [T, Hkv, D] into the slots [T] int64 of one layer's cache."""
        ...

    def paged_attention(self, q: Tensor, kv_cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Returns causal attention [T, Hq, D] of q [T, Hq, D], with scale D^-0.5 and softmax in at least fp32.

        Query i of sequence b sits at position kv_lens[b] - query_lens[b] + i and sees the keys up to it.
        Cache slots beyond kv_lens are never read.
        """
        ...

    def head_argmax(self, x: Tensor, head: Any) -> Tensor:
        """Returns ids [R] int64 of x [R, H] and a packed head [V, H]: the argmax of the logits, the lowest id among
        equals, -1 where a logit is not finite."""
        ...

    def edit_(self, logits: Tensor, edits: list[LogitEdits | None], drafts: list[list[int]]) -> None:
        """Applies edits in place.

        logits: [R, V], contiguous, in at least fp32.
        edits: [R], None where a row is not edited.
        drafts: [R], the drafts before each row, which count as output.
        """
        ...

    def truncate_(self, logits: Tensor, sampling: RowSampling) -> None:
        """Truncates logits [R, V], contiguous, in at least fp32, in place: tokens outside each row's distribution
        become -inf. A row with a NaN or +inf, or without a finite logit, becomes NaN throughout."""
        ...

    def choose(self, logits: Tensor, sampling: RowSampling) -> Tensor:
        """Returns ids [R] int64 of logits [R, V] after `truncate_`, the lowest among equals: the argmax, or where a row
        has noise the argmax of scale * logits + Gumbel noise, which is a sample of softmax(scale * logits) (the
        Gumbel-max trick, Gumbel 1954). -1 for a row with a NaN or +inf, or without a finite logit.

        Token v takes word v % 4 of the Philox call with counter (v // 4, position, start, stream) and
        G = -log(-log((word + 1/2) / 2^32)).
        """
        ...

    def softmax(self, logits: Tensor, scales: list[float]) -> Tensor:
        """Returns softmax(scale * logits) of logits [R, V], [R, V]; -inf becomes 0."""
        ...

    def residual_mass(self, laws: Residuals) -> list[float]:
        """Returns the sum of each residual distribution's masses, [n], in fp64."""
        ...

    def sample_residual(self, laws: Residuals, uniforms: list[float]) -> list[int]:
        """Returns a token of each residual distribution, [n], by inverse CDF in fp64.

        One without mass gives a token of p[p_rows[i]]; one whose sum is not finite gives -1.

        laws: the n distributions.
        uniforms: [n], numbers in [0, 1).
        """
        ...

    def uniforms(self, seeds: list[int], stream: int, positions: list[int], starts: list[int]) -> list[float]:
        """Returns numbers in [0, 1), [n]: 53 bits of the first two words of the Philox call (0, position, start,
        stream), see `specdec.kernels.philox`."""
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
    """Returns the single operations of a backend, for measurements that repeat parts of a step. Raises TypeError where
    it has none of its own."""
    if not isinstance(backend, Operations):
        raise TypeError(f"{type(backend).__name__} runs whole decoders only, it has no single operations")
    return backend
