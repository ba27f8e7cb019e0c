"""The operations a backend offers, with one signature each.

What a step hands over is not frozen, which would triple the time to make it; nobody changes it all the same.

Shapes: T packed tokens (ragged over sequences), B sequences, D head_dim, Hq/Hkv query/KV heads,
H hidden, I expert width, E experts, k experts per token, V vocabulary. A KV cache of one layer is
`[num_pages, 2, page_size, Hkv, D]`, keys first.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from specdec.kernels.fp8 import Fp8Kind, Fp8Matrix
from specdec.kernels.progress import Progress, silent


@dataclass(eq=False, slots=True)
class AttentionMetadata:
    """Where the packed tokens of one forward live in the paged cache.

    Sequence b contributes `query_lens[b]` tokens, the last of its `kv_lens[b]` cached ones, so
    `kv_lens` includes the tokens being attended: keys and values are appended first.
    """

    query_lens: list[int]  # [B], sum = T
    kv_lens: list[int]  # [B], kv_lens >= query_lens
    page_tables: list[list[int]]  # [B], at least ceil(kv_len / page_size) pages each
    page_size: int

    @property
    def query_starts(self) -> list[int]:
        """[B + 1]: sequence b's tokens are those from query_starts[b] to query_starts[b + 1]."""
        return list(accumulate(self.query_lens, initial=0))

    @property
    def positions(self) -> list[int]:
        """[T] of each token in its sequence."""
        return [at for count, end in zip(self.query_lens, self.kv_lens) for at in range(end - count, end)]

    @property
    def slots(self) -> list[int]:
        """[T]: page * page_size + offset of each token."""
        size, spans = self.page_size, zip(self.query_lens, self.kv_lens, self.page_tables)
        return [pages[at // size] * size + at % size for n, end, pages in spans for at in range(end - n, end)]

    def packed(self) -> array[int]:
        """The lists as int64 in one row: query_starts [B + 1], kv_lens [B], page_starts [B + 1], then all page
        tables."""
        packed = array("q", accumulate(self.query_lens, initial=0))
        packed.extend(self.kv_lens)
        packed.extend(accumulate(map(len, self.page_tables), initial=0))
        for table in self.page_tables:
            packed.extend(table)
        return packed


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


class HiddenRows(NamedTuple):
    """`num_rows` rows of `hidden` [T, H] from `first` on; T may be much larger."""

    hidden: Tensor
    first: int
    num_rows: int

    def tensor(self) -> Tensor:
        """[num_rows, H]"""
        return self.hidden[self.first : self.first + self.num_rows]


GREEDY = -1  # a stream: no noise
NOT_DRAFTED, NOT_FINITE = -1, -2  # in place of a draft's id
EXACT_MATCH, TOKEN_REJECTION, BLOCK_VERIFICATION = 0, 1, 2  # verification rules, see `specdec.kernels.rules`


@dataclass(eq=False)
class LogitEdits:
    """What a request does to single logits, as of its committed tokens; a row after drafts counts these as well. Its
    owner keeps it up to date.

    In this order. Biases [n] are added to the logits of bias_ids [n]. -inf become: end_ids, in rows after fewer than
    ends_banned drafts; and the last token of a bad word, word_tokens[word_starts[i] : word_starts[i + 1]], whose others
    are the last tokens before the row (`recent` holds the last committed ones, as many as a word can need). Where
    counted_ids is not empty: of these, the tokens of prompt and output, and of the drafts, a positive logit is divided
    by `repetition`, another one multiplied; `presence` is subtracted where a token occurs in output and drafts, and
    `frequency` once for each occurrence. counts: occurrences of counted_ids in the output.
    """

    bias_ids: array[int] = field(default_factory=lambda: array("q"))
    biases: array[float] = field(default_factory=lambda: array("d"))
    end_ids: array[int] = field(default_factory=lambda: array("q"))
    ends_banned: int = 0
    word_starts: array[int] = field(default_factory=lambda: array("q", [0]))
    word_tokens: array[int] = field(default_factory=lambda: array("q"))
    recent: array[int] = field(default_factory=lambda: array("q"))
    counted_ids: array[int] = field(default_factory=lambda: array("q"))
    counts: array[int] = field(default_factory=lambda: array("q"))
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0


@dataclass(eq=False, slots=True)
class RowSampling:
    """How each of R rows of logits becomes a token. Every field has R values.

    The law is softmax(scale * logits), cut to the top_k largest logits (0: all; ties with the smallest of them stay),
    then to the smallest set of most probable tokens that reaches top_p (1: all; the lowest ids first among equals),
    then to tokens of at least min_p times the largest probability (0: all).
    seeds, streams, positions, starts: the key of the row's noise, see `specdec.kernels.philox`. Stream GREEDY: the
    token is the argmax.
    """

    scales: list[float]  # 1 / temperature
    top_k: list[int]
    top_p: list[float]
    min_p: list[float]
    seeds: list[int]
    streams: list[int]
    positions: list[int]
    starts: list[int]

    def __len__(self) -> int:
        return len(self.scales)

    @property
    def cuts(self) -> bool:
        """Whether `Kernels.truncate_` has anything to cut."""
        return any(self.top_k) or any(self.min_p) or any(p < 1 for p in self.top_p)

    def packed(self) -> tuple[array[float], array[int], array[int]]:
        """scales, top_p, min_p as doubles; top_k, streams, positions, starts as int64; seeds as uint64."""
        return (
            array("d", self.scales + self.top_p + self.min_p),
            array("q", self.top_k + self.streams + self.positions + self.starts),
            array("Q", self.seeds),
        )

    def select(self, rows: list[int], advance: list[int] | None = None) -> RowSampling:
        """Some of the rows, with noise for positions `advance` [n] further on."""
        values = {f.name: [getattr(self, f.name)[r] for r in rows] for f in fields(self)}
        if advance is not None:
            values["positions"] = [position + more for position, more in zip(values["positions"], advance)]
        return RowSampling(**values)


@dataclass(eq=False, slots=True)
class DraftSampling:
    """How a chain's B sequences draw their drafts, where not all of them take the argmax whatever it is.

    rows: for the first step; positions advance by one per step. edits [B]: of the logits before. min_confidence [B]: a
    sequence's chain ends before a draft whose law has no probability of at least this (it looks at the law, never at
    the token drawn from it). probs [Q, K, V] receives the laws of the drafts of those sequences that have a prob_row
    [B] in it, not -1.
    """

    rows: RowSampling
    edits: list[LogitEdits | None]
    min_confidence: list[float]
    probs: Tensor | None
    prob_rows: list[int]


@dataclass(eq=False, slots=True)
class DraftChain:
    """What the MTP layer runs in one step of B sequences: their pending pairs, then drafts from the last ones.

    input_ids [T] and previous, T rows in any number of pieces: the pairs, at `metadata`'s positions. kv_cache [1,
    pages, 2, page_size, Hkv, D], appended to. counts [B] >= 0: the most drafts of each sequence. recycle_unnormed:
    feed back the output before the final norm. sampling: None where every draft is an argmax.
    """

    input_ids: list[int]
    previous: list[HiddenRows]
    metadata: AttentionMetadata
    kv_cache: Tensor
    counts: list[int]
    recycle_unnormed: bool
    sampling: DraftSampling | None = None


class Drafts(NamedTuple):
    """Drafts of B sequences. on_device [B, K], padded with NOT_DRAFTED: where it is given the ids are only there, and
    token_ids has as many zeros as there may be: chains that their confidence ended are shorter."""

    token_ids: list[list[int]]
    on_device: Tensor | None = None


@dataclass(eq=False, slots=True)
class Verification:
    """B sequences' drafts before the target's rows, and the rule by which each decides.

    first_rows [B]: of the forward's rows, the one that decides a sequence's next token; those of its drafts follow.
    drafts [B] of up to K. rules [B]: EXACT_MATCH, TOKEN_REJECTION or BLOCK_VERIFICATION. rows: of each first row;
    positions advance by one per row; a rejection rule's iteration starts at the first position. edits [B]: of the
    logits before. prob_rows [B]: of draft_probs [Q, K, V], the laws that the drafts were drawn from; -1: point masses.
    keep_logits: hand them back. drafts_on_device [D, K], padded with NOT_DRAFTED: where it is given, the drafts of
    sequence b are its row draft_rows[b] (-1: there are none), and `drafts` and the forward's input_ids have as many
    zeros as there may be.
    """

    first_rows: list[int]
    drafts: list[list[int]]
    rules: list[int]
    rows: RowSampling
    edits: list[LogitEdits | None]
    prob_rows: list[int]
    draft_probs: Tensor | None
    keep_logits: bool = False
    drafts_on_device: Tensor | None = None
    draft_rows: list[int] = field(default_factory=list)


class Verified(NamedTuple):
    """hidden [T, H]: the target's, after its final norm. token_ids [B]: what each sequence emits, its accepted drafts
    and one token more, which is -1 where a row of logits that decides is not finite. raw, processed [R, V], or None:
    the logits of all rows, one more per sequence than Verification.drafts has, before and after edits and truncation;
    processed ones are valid for the rows of emitted tokens. draft_token_ids [B]: the drafts that there were, given
    where they were on the device."""

    hidden: Tensor
    token_ids: list[list[int]]
    raw: Tensor | None
    processed: Tensor | None
    draft_token_ids: list[list[int]] | None = None


@dataclass(frozen=True, eq=False)
class Residuals:
    """n laws over the vocabulary, up to a factor: law_i(x) = max(0, scales_i * p[p_rows_i, x] - q[q_rows_i, x]), and
    0 at x = excluded_i.

    p [R, V]; q [Q, V], or None; q_rows_i = -1: q is 0; excluded_i = -1: no token is excluded.
    """

    p: Tensor
    p_rows: list[int]
    scales: list[float]
    q: Tensor | None
    q_rows: list[int]
    excluded: list[int]


class Kernels(Protocol):
    """A backend: chosen once by `specdec.kernels.select`, then called without further questions.

    dtype: of the matrices as they are loaded. activation_dtype: of everything else that flows through the
    model, biases and norm weights included. cache_dtypes: what a KV cache may be stored in. num_scratch_pages: so many
    pages at the end of an engine's KV cache are the backend's own. fp8: the kinds of matrices of an FP8 checkpoint that
    stay in FP8; `pack` dequantises the others.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    activation_dtype: torch.dtype
    cache_dtypes: tuple[torch.dtype, ...]
    fp8: frozenset[Fp8Kind]
    num_scratch_pages: int

    def pack(self, weight: Tensor | Fp8Matrix, *, full_precision: bool = False) -> Any:
        """A matrix [out, in], or a stack of experts [E, out, in], in the form that this backend reads.

        full_precision: never quantised (the router), and never an Fp8Matrix."""
        ...

    def pack_gate_up(self, weight: Tensor | Fp8Matrix) -> Any:
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

    def decode(
        self,
        decoder: Any,
        input_ids: list[int],
        previous: list[HiddenRows] | None,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        expert_ids: Tensor | None = None,
    ) -> DecoderOutput:
        """The whole of a prepared decoder: embed, fuse (MTP), layers, final norm.

        input_ids [T]; previous, T rows, if and only if the decoder has a fusion; kv_cache
        [layers, pages, 2, page_size, Hkv, D], appended to. expert_ids [layers, T, k] int64 is filled with every
        row's choices, where a layer has experts. Equals `specdec.kernels.composed.decode`, to the bit where the
        backend is row-invariant.
        """
        ...

    def draft_chain(self, decoder: Any, head: Any, chain: DraftChain, expert_ids: Tensor | None = None) -> Drafts:
        """Drafts of a prepared MTP layer: draft 1 comes from the last pair's row; each later one from one more row,
        which takes the draft before and the output before.

        expert_ids [1, T + (K-1) B, k] int64 is filled with the experts of the pairs, then at the beginning of every
        B rows with those of the sequences that still draft. -> [B] of up to counts ids, fewer where its confidence
        ended a chain; where logits are not finite the last is NOT_FINITE, and all chains end (on the device they go
        on, and any may be NOT_FINITE). Equals `specdec.kernels.composed.draft_chain`.
        """
        ...

    def verify(
        self,
        decoder: Any,
        head: Any,
        input_ids: list[int],
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        verification: Verification,
        expert_ids: Tensor | None = None,
    ) -> Verified:
        """`decode`, then for the rows that decide: logits -> edits -> truncation -> rules. Equals
        `specdec.kernels.composed.verify`."""
        ...

    def head_argmax(self, x: Tensor, head: Any) -> Tensor:
        """x [R, H], packed head [V, H] -> ids [R] int64: argmax of the logits, the lowest id among equals,
        -1 where a logit is not finite."""
        ...

    def edit_(self, logits: Tensor, edits: list[LogitEdits | None], drafts: list[list[int]]) -> None:
        """logits [R, V], contiguous, in at least fp32; edits and the drafts before a row [R]: in place."""
        ...

    def truncate_(self, logits: Tensor, sampling: RowSampling) -> None:
        """logits [R, V], contiguous, in at least fp32: tokens outside each row's law become -inf, in place. A row with
        a NaN or +inf, or without a finite logit, becomes NaN throughout."""
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


@runtime_checkable
class CapturesGraphs(Protocol):
    """A backend that can record forwards of fixed shapes beforehand and replay them in decode steps."""

    def capture(
        self,
        target: Any,
        mtp: Any | None,
        kv_cache: Tensor,
        *,
        max_num_seqs: int,
        draft_lengths: list[int],
        max_model_len: int,
        progress: Progress = silent,
    ) -> None:
        """Prepared decoders; kv_cache with the backend's scratch pages, its last layer the MTP layer's if there is
        one. What decodes up to max_num_seqs sequences with no drafts, or up to one of draft_lengths each, is replayed
        from then on, everything else runs as before. `progress` hears of each graph."""
        ...
