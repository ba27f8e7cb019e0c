"""What passes between the engine and a backend about forwards: weights, metadata, hidden states. It is plain data;
`specdec.kernels.decisions` has what is about tokens.

What a step hands over is not frozen, which would triple the time to make it; nobody changes it all the same.

Shapes: T packed tokens (ragged over sequences), B sequences, D head_dim, Hq/Hkv query/KV heads, H hidden, I expert
width, E experts, V vocabulary. A KV cache of one layer is `[num_pages, 2, page_size, Hkv, D]`, keys first.

A *packed* matrix is in the form in which a backend reads it (`Backend.pack`), a *prepared* decoder likewise
(`Backend.prepare`); nobody else looks into them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(eq=False, slots=True)
class AttentionMetadata:
    """Where the packed tokens of one forward live in the paged cache.

    Sequence b contributes `query_lens[b]` tokens, the last ones of its `kv_lens[b]` cached tokens.
    """

    query_lens: list[int]
    """[B]: new tokens of each sequence; their sum is T."""
    kv_lens: list[int]
    """[B]: cached tokens of each sequence, the new ones included (keys and values are appended first)."""
    page_tables: list[list[int]]
    """[B]: each sequence's pages in order, at least ceil(kv_len / page_size) of them."""
    page_size: int
    """Number of tokens that a page holds."""

    @property
    def query_starts(self) -> list[int]:
        """[B + 1]: sequence b's tokens are those from query_starts[b] to query_starts[b + 1]."""
        return list(accumulate(self.query_lens, initial=0))

    @property
    def positions(self) -> list[int]:
        """[T]: each token's position in its sequence."""
        return [at for count, end in zip(self.query_lens, self.kv_lens) for at in range(end - count, end)]

    @property
    def slots(self) -> list[int]:
        """[T]: each token's place in the cache, page * page_size + offset."""
        size, spans = self.page_size, zip(self.query_lens, self.kv_lens, self.page_tables)
        return [pages[at // size] * size + at % size for n, end, pages in spans for at in range(end - n, end)]


@dataclass(frozen=True)
class RoutingConfig:
    """How a router chooses experts (Glm4Moe: sigmoid scores, bias-corrected grouped top-k)."""

    num_experts_per_tok: int
    """Experts that each token chooses."""
    n_group: int
    """Number of groups that the experts are divided into."""
    topk_group: int
    """Number of groups, the best ones, that a token's experts are chosen from."""
    norm_topk_prob: bool
    """Whether the chosen experts' weights are made to sum to 1."""
    routed_scaling_factor: float
    """Factor that the weights are multiplied by in the end."""


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Weights of one attention block."""

    qkv: Any
    """Packed [(Hq + 2 Hkv) D, H]: projections of queries, keys and values, in this order."""
    qkv_bias: Tensor | None
    """[(Hq + 2 Hkv) D]: their bias; None where there is none."""
    o: Any
    """Packed [H, Hq D]: output projection."""
    q_norm: Tensor | None
    """[D]: weight of the queries' norm; None where queries are not normed."""
    k_norm: Tensor | None
    """[D]: weight of the keys' norm; None where keys are not normed."""


@dataclass(frozen=True, eq=False)
class MLPWeights:
    """Weights of one gated MLP, or of a stack of E of them."""

    gate_up: Any
    """[2I, H] or [E, 2I, H], packed by `Backend.pack_gate_up`: the gate rows first."""
    down: Any
    """Packed [H, I] or [E, H, I]: down projection."""


@dataclass(frozen=True, eq=False)
class MoEWeights:
    """Weights of a mixture of routed experts, plus shared experts whose output is not scaled."""

    router: Any
    """Packed [E, H], in at least fp32: gives the experts' logits."""
    correction_bias: Tensor
    """[E], in at least fp32: added to the scores for the choice of experts only."""
    experts: MLPWeights
    """Stack of the E routed experts."""
    shared: MLPWeights
    """The shared experts, as one MLP."""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """Weights of one decoder layer: x += attention(norm(x)); x += mlp(norm(x))."""

    input_norm: Tensor
    """[H]: weight of the norm before attention."""
    attention: AttentionWeights
    """The layer's attention block."""
    post_attention_norm: Tensor
    """[H]: weight of the norm before the MLP."""
    mlp: MLPWeights | MoEWeights
    """The dense MLP, or the mixture of experts."""


@dataclass(frozen=True, eq=False)
class FusionWeights:
    """Weights of the MTP layer's input: eh_proj(concat[enorm(embedding), hnorm(previous)])."""

    enorm: Tensor
    """[H]: weight of the norm of the token's embedding."""
    hnorm: Tensor
    """[H]: weight of the norm of the previous hidden state."""
    eh_proj: Any
    """Packed [H, 2H]: projection of both, the embedding first."""


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that its weights do not tell."""

    num_heads: int
    """Query heads, Hq."""
    num_kv_heads: int
    """Key and value heads, Hkv."""
    head_dim: int
    """Size of a head, D."""
    rms_norm_eps: float
    """Number that every norm adds to the mean of squares."""
    num_experts: int
    """Routed experts of a layer, E."""
    routing: RoutingConfig
    """How a layer's experts are chosen."""


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """Weights of a whole decoder: the target model, or its MTP layer."""

    shape: DecoderShape
    """Sizes that the tensors do not tell."""
    embedding: Tensor
    """[V, H], not packed: one row per token id."""
    fusion: FusionWeights | None
    """Fusion of the MTP layer's input; None for the target model."""
    layers: tuple[LayerWeights, ...]
    """The layers, first to last."""
    norm: Tensor
    """[H]: weight of the final norm."""
    cos_sin: Tensor
    """[max_positions, rotary_dim] fp32: RoPE's cosines, then its sines."""


class DecoderOutput(NamedTuple):
    """What a decoder's forward returns."""

    normed: Tensor
    """[T, H]: hidden states after the final norm."""
    unnormed: Tensor
    """[T, H]: hidden states before the final norm."""


class HiddenRows(NamedTuple):
    """A view of some rows of hidden states, which keeps the whole tensor alive."""

    hidden: Tensor
    """[T, H]: the tensor that has the rows; T may be much larger than num_rows."""
    first: int
    """Index of the first row."""
    num_rows: int
    """Number of rows, `first` included."""

    def tensor(self) -> Tensor:
        """Returns the rows alone, [num_rows, H]."""
        return self.hidden[self.first : self.first + self.num_rows]
