"""What passes between the engine and a backend: plain data, no operations.

What a step hands over is not frozen, which would triple the time to make it; nobody changes it all the same.

Shapes: T packed tokens (ragged over sequences), B sequences, K draft tokens, R rows of logits, D head_dim, Hq/Hkv
query/KV heads, H hidden, I expert width, E experts, V vocabulary. A KV cache of one layer is
`[num_pages, 2, page_size, Hkv, D]`, keys first.

A *packed* matrix is in the form in which a backend reads it (`Backend.pack`), a *prepared* decoder likewise
(`Backend.prepare`); nobody else looks into them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

GREEDY = -1
"""In place of a noise stream: the token is the argmax."""
NOT_DRAFTED = -1
"""In place of a draft's id: the chain ended before it."""
NOT_FINITE = -2
"""In place of a draft's id: the draft model's logits were not finite."""
EXACT_MATCH, TOKEN_REJECTION, BLOCK_VERIFICATION = 0, 1, 2
"""Verification rules, see `specdec.kernels.rules`."""


@dataclass(eq=False, slots=True)
class AttentionMetadata:
    """Where the packed tokens of one forward live in the paged cache.

    Sequence b contributes `query_lens[b]` tokens, the last ones of its `kv_lens[b]` cached tokens.
    """

    query_lens: list[int]
    """[B], sum = T"""
    kv_lens: list[int]
    """[B]: cached tokens, those being attended included (keys and values are appended first)"""
    page_tables: list[list[int]]
    """[B], at least ceil(kv_len / page_size) pages each"""
    page_size: int
    """Tokens of a page."""

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
        """[T]: page * page_size + offset of each token."""
        size, spans = self.page_size, zip(self.query_lens, self.kv_lens, self.page_tables)
        return [pages[at // size] * size + at % size for n, end, pages in spans for at in range(end - n, end)]


@dataclass(frozen=True)
class RoutingConfig:
    """How a router chooses experts (Glm4Moe: sigmoid scores, bias-corrected grouped top-k)."""

    num_experts_per_tok: int
    n_group: int
    """Groups of experts; experts are chosen from the best topk_group of them."""
    topk_group: int
    norm_topk_prob: bool
    """The chosen experts' weights are made to sum to 1."""
    routed_scaling_factor: float
    """What the weights are multiplied by in the end."""


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """One attention block."""

    qkv: Any
    """Packed [(Hq + 2 Hkv) D, H]"""
    qkv_bias: Tensor | None
    """[(Hq + 2 Hkv) D]"""
    o: Any
    """Packed [H, Hq D]"""
    q_norm: Tensor | None
    """[D], where queries and keys are normed"""
    k_norm: Tensor | None
    """[D]"""


@dataclass(frozen=True, eq=False)
class MLPWeights:
    """One gated MLP, or a stack of E of them."""

    gate_up: Any
    """[2I, H] by `Backend.pack_gate_up`, the gate rows first"""
    down: Any
    """Packed [H, I]"""


@dataclass(frozen=True, eq=False)
class MoEWeights:
    """A mixture of routed experts, plus shared experts whose output is not scaled."""

    router: Any
    """Packed [E, H], in at least fp32"""
    correction_bias: Tensor
    """[E], in at least fp32"""
    experts: MLPWeights
    shared: MLPWeights


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One decoder layer: x += attention(norm(x)); x += mlp(norm(x))."""

    input_norm: Tensor
    """[H]"""
    attention: AttentionWeights
    post_attention_norm: Tensor
    """[H]"""
    mlp: MLPWeights | MoEWeights


@dataclass(frozen=True, eq=False)
class FusionWeights:
    """The MTP layer's input: eh_proj(concat[enorm(embedding), hnorm(previous)])."""

    enorm: Tensor
    """[H]"""
    hnorm: Tensor
    """[H]"""
    eh_proj: Any
    """Packed [H, 2H]"""


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that its weights do not tell."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    num_experts: int
    routing: RoutingConfig


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """A whole decoder: the target model, or its MTP layer."""

    shape: DecoderShape
    embedding: Tensor
    """[V, H], not packed"""
    fusion: FusionWeights | None
    """Given for the MTP layer."""
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    """[H], the final norm"""
    cos_sin: Tensor
    """[max_positions, rotary_dim] fp32: cosines, then sines"""


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


@dataclass(eq=False)
class LogitEdits:
    """What a request does to single logits, as of its committed tokens; a row after drafts counts these as well.

    Its owner keeps it up to date. Applied in the order of the fields: biases, bans, penalties. Penalties apply to the
    tokens of prompt, output and drafts, where counted_ids is not empty.
    """

    bias_ids: array[int] = field(default_factory=lambda: array("q"))
    """[n]: tokens whose logits get a bias"""
    biases: array[float] = field(default_factory=lambda: array("d"))
    """[n]: what is added to these logits"""
    end_ids: array[int] = field(default_factory=lambda: array("q"))
    """Tokens that become impossible in rows after fewer than ends_banned drafts."""
    ends_banned: int = 0
    """How many more tokens must come before one may end the output."""
    word_starts: array[int] = field(default_factory=lambda: array("q", [0]))
    """[words + 1]: bad word i is word_tokens[word_starts[i] : word_starts[i + 1]]. Its last token becomes impossible
    where the tokens before the row end with its others."""
    word_tokens: array[int] = field(default_factory=lambda: array("q"))
    recent: array[int] = field(default_factory=lambda: array("q"))
    """The last committed tokens, as many as a bad word can need."""
    counted_ids: array[int] = field(default_factory=lambda: array("q"))
    """Tokens of prompt and output, each once."""
    counts: array[int] = field(default_factory=lambda: array("q"))
    """How often each of counted_ids occurs in the output."""
    repetition: float = 1.0
    """Divides positive logits, multiplies others."""
    presence: float = 0.0
    """Subtracted where a token occurs in output or drafts."""
    frequency: float = 0.0
    """Subtracted once for each occurrence."""


@dataclass(eq=False, slots=True)
class RowSampling:
    """How each of R rows of logits becomes a token. Every field has R values.

    A row's distribution is softmax(scale * logits), cut to the top_k largest logits (ties with the smallest of them
    stay), then to the smallest set of most probable tokens that reaches top_p (the lowest ids first among equals), then
    to tokens of at least min_p times the largest probability.
    """

    scales: list[float]
    """1 / temperature"""
    top_k: list[int]
    """0: all"""
    top_p: list[float]
    """1: all"""
    min_p: list[float]
    """0: all"""
    seeds: list[int]
    """These four are the key of the row's noise, see `specdec.kernels.philox`."""
    streams: list[int]
    """GREEDY: no noise, the token is the argmax."""
    positions: list[int]
    starts: list[int]

    def __len__(self) -> int:
        return len(self.scales)

    @property
    def cuts(self) -> bool:
        """Whether top_k, top_p or min_p leave out any token."""
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
class ChainSampling:
    """How the drafts of a chain's B sequences are drawn, where not all of them are argmaxes whatever happens."""

    rows: RowSampling
    """[B], for the first draft; positions advance by one per draft."""
    edits: list[LogitEdits | None]
    """[B]: what is done to the logits before."""
    min_confidence: list[float]
    """[B]: a sequence's chain ends before a draft whose distribution gives no token this probability. That looks at
    the distribution, never at the token drawn from it."""
    keep_probs: list[bool]
    """[B]: whether the sequence's rule needs the distributions that its drafts were drawn from."""


@dataclass(eq=False, slots=True)
class DraftChain:
    """What the MTP layer runs in one step of B sequences: their pending pairs, then drafts after the last ones."""

    input_ids: list[int]
    """[T]: the pairs' tokens, at `metadata`'s positions"""
    previous: list[HiddenRows]
    """The pairs' hidden states, T rows in any number of pieces."""
    metadata: AttentionMetadata
    kv_cache: Tensor
    """[1, pages, 2, page_size, Hkv, D], appended to"""
    counts: list[int]
    """[B]: the most drafts of each sequence, at least 0"""
    recycle_unnormed: bool
    """Feed back the output before the final norm instead of after it."""
    sampling: ChainSampling | None = None
    """None where every draft is an argmax."""


@dataclass(eq=False, slots=True)
class Drafts:
    """Drafts of B sequences, as a drafter makes them and `Backend.verify` takes them.

    A drafter of one's own makes them with `Drafts.of`. Where a backend's chain has left them on a device, the host does
    not know them before they are verified (`Verified.draft_token_ids`): until then only `counts` says anything.
    """

    token_ids: list[list[int]]
    """[B] of up to K: the drafts; where they are on a device, as many zeros as there may be."""
    prob_rows: list[int]
    """[B]: draft i of sequence b was drawn from probs[prob_rows[b], i]; -1: it is a point mass, or its rule needs no
    distributions."""
    probs: Tensor | None = None
    """[Q, K, V]"""
    on_device: Tensor | None = None
    """[D, K] int64, padded with NOT_DRAFTED"""
    device_rows: list[int] = field(default_factory=list)
    """[B]: each sequence's row of on_device; -1: it has no drafts."""

    @classmethod
    def of(cls, token_ids: list[list[int]]) -> Drafts:
        """token_ids [B] of up to K, chosen in any way that does not look at the noise of later tokens. Each draft is
        verified as a point mass: it is accepted with the probability that the target gives it."""
        return cls(token_ids, [-1] * len(token_ids))

    @property
    def counts(self) -> list[int]:
        """[B]: how many drafts each sequence has, or may have at the most where they are on a device."""
        return [len(row) for row in self.token_ids]

    def select(self, sequences: list[int]) -> Drafts:
        """The drafts of some sequences, by their numbers b; none at all for -1."""
        return Drafts(
            [self.token_ids[b] if b >= 0 else [] for b in sequences],
            [self.prob_rows[b] if b >= 0 else -1 for b in sequences],
            self.probs,
            self.on_device,
            [] if self.on_device is None else [self.device_rows[b] if b >= 0 else -1 for b in sequences],
        )


def room_for_probs(
    keep: list[bool], num_steps: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, list[int]]:
    """Memory for the distributions of a chain's drafts, and each sequence's row in it: `Drafts.probs`, `prob_rows`."""
    numbers = iter(range(sum(keep)))
    rows = [next(numbers) if wanted else -1 for wanted in keep]
    if not any(keep):
        return None, rows
    return torch.empty(sum(keep), num_steps, vocab_size, dtype=dtype, device=device), rows


@dataclass(eq=False, slots=True)
class VerifyBatch:
    """The B sequences of a target forward that decide tokens: their drafts, and the rule by which each decides."""

    first_rows: list[int]
    """[B]: the forward's row that decides a sequence's next token; those of its drafts follow."""
    drafts: Drafts
    """[B]"""
    rules: list[int]
    """[B]: EXACT_MATCH, TOKEN_REJECTION or BLOCK_VERIFICATION"""
    rows: RowSampling
    """[B]: sampling of each sequence's first deciding row. Its further rows use the next positions; for the rejection
    rules the first position is also the noise key's `start`."""
    edits: list[LogitEdits | None]
    """[B]: what is done to the logits before."""
    keep_logits: bool = False
    """Hand the logits back."""

    def place(self, input_ids: list[int]) -> list[int]:
        """The forward's tokens [T], with the drafts that the host knows in the places that were left for them."""
        placed = list(input_ids)
        for first, drafts in zip(self.first_rows, self.drafts.token_ids):
            # Where a draft is NOT_FINITE the sequence is lost, but its row must name some token.
            known = [max(token, 0) for token in drafts] if NOT_FINITE in drafts else drafts
            placed[first + 1 : first + 1 + len(known)] = known
        return placed


class Verified(NamedTuple):
    """What a target forward decided about B sequences.

    hidden: the target's hidden states [T, H], after its final norm.
    token_ids: [B], what each sequence emits, its accepted drafts and one token more, which is -1 where a row of logits
        that decides is not finite.
    draft_token_ids: [B], the drafts that there were, known by now wherever they were made; NOT_FINITE ends those of a
        draft model whose logits were not finite.
    raw, processed: None, or the logits [R, V] of all rows, one more per sequence than it had drafts at the most, before
        and after edits and truncation; processed ones are valid for the rows of emitted tokens.
    """

    hidden: Tensor
    token_ids: list[list[int]]
    draft_token_ids: list[list[int]]
    raw: Tensor | None = None
    processed: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Residuals:
    """n distributions over the vocabulary, up to a factor:
    max(0, scales_i * p[p_rows_i, x] - q[q_rows_i, x]), and 0 at x = excluded_i.
    """

    p: Tensor
    """[R, V]"""
    p_rows: list[int]
    """[n]"""
    scales: list[float]
    """[n]"""
    q: Tensor | None
    """[Q, V]"""
    q_rows: list[int]
    """[n]; -1: q is 0"""
    excluded: list[int]
    """[n]; -1: no token is excluded"""
