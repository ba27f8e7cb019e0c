"""The operations a backend offers, with one signature each.

Shapes: T packed tokens (ragged over sequences), B sequences, D head_dim, Hq/Hkv query/KV heads,
H hidden, I expert width, E experts, k experts per token, V vocabulary. A KV cache of one layer is
`[num_pages, 2, page_size, Hkv, D]`, keys first.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


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
    def packed(self) -> array[int]:
        """The lists as int64 in one row, made once for all layers of a forward: query_starts [B + 1], kv_lens [B],
        page_starts [B + 1], then all page tables."""
        query_starts = [0, *accumulate(self.query_lens)]
        return array("q", query_starts + self.kv_lens + flat_page_tables(self.page_tables))


@dataclass(frozen=True)
class RoutingConfig:
    """How a router chooses experts (Glm4Moe: sigmoid scores, bias-corrected grouped top-k)."""

    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """qkv: one packed matrix [(Hq + 2 Hkv) D, H]; qkv_bias [(Hq + 2 Hkv) D]; o: packed [H, Hq D]; norms [D]."""

    qkv: Any
    qkv_bias: Tensor | None
    o: Any
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True, eq=False)
class MLPWeights:
    """gate_up: by `pack_gate_up`, [2I, H] with the gate rows first; down: packed [H, I]. Or stacks of E of them."""

    gate_up: Any
    down: Any


@dataclass(frozen=True, eq=False)
class MoEWeights:
    """router: packed [E, H]; correction_bias [E]; both at least fp32. The shared experts' output is not scaled."""

    router: Any
    correction_bias: Tensor
    experts: MLPWeights
    shared: MLPWeights


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    input_norm: Tensor
    attention: AttentionWeights
    post_attention_norm: Tensor
    mlp: MLPWeights | MoEWeights


@dataclass(frozen=True, eq=False)
class FusionWeights:
    """The MTP layer's input: eh_proj(concat[enorm(embedding), hnorm(previous)]), packed eh_proj [H, 2H]."""

    enorm: Tensor
    hnorm: Tensor
    eh_proj: Any


@dataclass(frozen=True)
class DecoderShape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    num_experts: int
    routing: RoutingConfig


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """embedding [V, H], not packed; cos_sin [max_positions, rotary_dim] fp32; fusion: the MTP layer has one."""

    shape: DecoderShape
    embedding: Tensor
    fusion: FusionWeights | None
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    cos_sin: Tensor


class DecoderOutput(NamedTuple):
    """Hidden states [T, H] after the final norm, and before it."""

    normed: Tensor
    unnormed: Tensor


@dataclass(frozen=True, eq=False)
class DraftChain:
    """What a chain of drafts starts from, for B sequences.

    last [B, H]: the MTP layer's outputs at `positions` [B]. counts [B] >= 1, descending: drafts of each sequence.
    page_tables [B]; kv_cache [1, pages, 2, page_size, Hkv, D], appended to. recycle_unnormed: feed back the output
    before the final norm.
    """

    last: DecoderOutput
    positions: list[int]
    page_tables: list[list[int]]
    kv_cache: Tensor
    counts: list[int]
    recycle_unnormed: bool

    @property
    def active(self) -> list[int]:
        """[K]: how many sequences, the first ones, draft at each step."""
        return [sum(count > step for count in self.counts) for step in range(self.counts[0])]


def flat_page_tables(page_tables: list[list[int]]) -> list[int]:
    """page_starts [B + 1], then the pages of all tables."""
    flat = [0, *accumulate(map(len, page_tables))]
    for table in page_tables:
        flat += table
    return flat


class Kernels(Protocol):
    """A backend: chosen once by `specdec.kernels.select`, then called without further questions.

    dtype: of the matrices as they are loaded. activation_dtype: of everything else that flows through the
    model, biases and norm weights included. cache_dtypes: what a KV cache may be stored in.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    activation_dtype: torch.dtype
    cache_dtypes: tuple[torch.dtype, ...]

    def pack(self, weight: Tensor, *, full_precision: bool = False) -> Any:
        """A matrix [out, in], or a stack [E, out, in], in the form that this backend reads.

        full_precision: never quantised (the router)."""
        ...

    def pack_gate_up(self, weight: Tensor) -> Any:
        """The same for gate and up projections [2I, H], or [E, 2I, H], the gate rows first: for `mlp` and `moe`."""
        ...

    def num_bytes(self, packed: Any) -> int:
        """Bytes of a packed weight."""
        ...

    def prepare(self, decoder: DecoderWeights) -> Any:
        """A decoder in the form that `decode` reads. It refers to the weights, so they must stay as they are."""
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

    def decode(
        self,
        decoder: Any,
        input_ids: Tensor,
        previous: Tensor | None,
        positions: Tensor,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        expert_ids: Tensor | None = None,
    ) -> DecoderOutput:
        """The whole of a prepared decoder: embed, fuse (MTP), layers, final norm.

        input_ids, positions [T] int64; previous [T, H], if and only if the decoder has a fusion; kv_cache
        [layers, pages, 2, page_size, Hkv, D], appended to. expert_ids [layers, T, k] int64 is filled with every
        row's choices, where a layer has experts. Equals `specdec.kernels.composed.decode`, to the bit where the
        backend is row-invariant.
        """
        ...

    def draft_chain(self, decoder: Any, head: Any, chain: DraftChain, expert_ids: Tensor | None = None) -> Tensor:
        """Greedy drafts of a prepared MTP layer: draft 1 is the argmax of the chain's start; each later one that of one
        more row, which takes the draft before and the output before.

        expert_ids [K-1, 1, B, k] int64 is filled with the experts of each step's rows. -> ids [B, K] int64, -1 beyond
        a sequence's count and from a step on whose logits are not finite.
        """
        ...

    def head_argmax(self, x: Tensor, head: Any) -> Tensor:
        """x [R, H], packed head [V, H] -> ids [R] int64: argmax of the logits, the lowest id among equals,
        -1 where a logit is not finite."""
        ...

    def softmax(self, logits: Tensor, scales: Tensor) -> Tensor:
        """logits [R, V], scales [R] (1 / temperature) -> softmax(logits * scale) [R, V]; -inf becomes 0."""
        ...

    def gumbel_argmax(self, logits: Tensor, scales: Tensor, seeds: list[int], positions: list[int]) -> Tensor:
        """logits [R, V], scales [R] -> ids [R] int64: argmax of logits * scale + Gumbel noise, which is a sample of
        softmax(logits * scale). -1 where a score is not finite.

        The noise is a function of (seed, position, token) alone: token v takes word v % 4 of Philox4x32-10 with
        counter (v // 4, position, 0, 0) and the 64-bit seed as key; G = -log(-log((word + 1/2) / 2^32)).
        """
        ...
