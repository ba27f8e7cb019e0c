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
"""Stands in place of a noise stream: the token is the argmax."""
NOT_DRAFTED = -1
"""Stands in place of a draft's id: the chain ended before it."""
NOT_FINITE = -2
"""Stands in place of a draft's id: the draft model's logits were not finite."""
EXACT_MATCH, TOKEN_REJECTION, BLOCK_VERIFICATION = 0, 1, 2
"""Verification rules, see `specdec.kernels.rules`."""


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


@dataclass(eq=False)
class LogitEdits:
    """What a request's parameters do to single logits, as of its committed tokens.

    Its owner keeps it up to date. A row that comes after drafts counts the drafts before it as well. Edits are applied
    in the order of the fields: biases, bans, penalties. Penalties apply to the tokens of prompt, output and drafts,
    and only where counted_ids is not empty.
    """

    bias_ids: array[int] = field(default_factory=lambda: array("q"))
    """[n]: tokens whose logits get a bias."""
    biases: array[float] = field(default_factory=lambda: array("d"))
    """[n]: what is added to these logits."""
    end_ids: array[int] = field(default_factory=lambda: array("q"))
    """Tokens that become impossible in rows after fewer than ends_banned drafts."""
    ends_banned: int = 0
    """Number of tokens that must still come before one of end_ids may end the output."""
    word_starts: array[int] = field(default_factory=lambda: array("q", [0]))
    """[words + 1]: bad word i is word_tokens[word_starts[i] : word_starts[i + 1]]. Its last token becomes impossible
    where the tokens before the row end with its others."""
    word_tokens: array[int] = field(default_factory=lambda: array("q"))
    """Tokens of all bad words, one word after the other."""
    recent: array[int] = field(default_factory=lambda: array("q"))
    """The last committed tokens, as many as a bad word can need."""
    counted_ids: array[int] = field(default_factory=lambda: array("q"))
    """Tokens of prompt and output, each once."""
    counts: array[int] = field(default_factory=lambda: array("q"))
    """How often each of counted_ids occurs in the output; 0 for tokens of the prompt alone."""
    repetition: float = 1.0
    """Factor that positive logits are divided by and others multiplied by, where a token occurs anywhere."""
    presence: float = 0.0
    """Subtracted once where a token occurs in output or drafts."""
    frequency: float = 0.0
    """Subtracted for each occurrence in output and drafts."""


@dataclass(eq=False, slots=True)
class RowSampling:
    """How each of R rows of logits becomes a token. Every field has R values.

    A row's distribution is softmax(scale * logits), cut to the top_k largest logits (ties with the smallest of them
    stay), then to the smallest set of most probable tokens that reaches top_p (the lowest ids first among equals), then
    to tokens of at least min_p times the largest probability.
    """

    scales: list[float]
    """[R]: 1 / temperature."""
    top_k: list[int]
    """[R]: number of tokens that stay; 0 keeps all."""
    top_p: list[float]
    """[R]: probability that the tokens that stay must reach; 1 keeps all."""
    min_p: list[float]
    """[R]: share of the largest probability that a token must have to stay; 0 keeps all."""
    seeds: list[int]
    """[R]: 64-bit seeds. Seed, stream, position and start are the key of the noise, see `specdec.kernels.philox`."""
    streams: list[int]
    """[R]: a `Stream`, or GREEDY: no noise, the token is the argmax."""
    positions: list[int]
    """[R]: absolute position of the token that the row decides."""
    starts: list[int]
    """[R]: position at which the iteration that decides it began; 0 where noise is keyed by position alone."""

    def __len__(self) -> int:
        return len(self.scales)

    @property
    def cuts(self) -> bool:
        """Whether any row asks for top_k, top_p or min_p."""
        return any(self.top_k) or any(self.min_p) or any(p < 1 for p in self.top_p)

    def packed(self) -> tuple[array[float], array[int], array[int]]:
        """Returns three arrays: scales, top_p, min_p as doubles; top_k, streams, positions, starts as int64; seeds as
        uint64."""
        return (
            array("d", self.scales + self.top_p + self.min_p),
            array("q", self.top_k + self.streams + self.positions + self.starts),
            array("Q", self.seeds),
        )

    def select(self, rows: list[int], advance: list[int] | None = None) -> RowSampling:
        """Returns the sampling of some rows.

        rows: [n], indices of the rows.
        advance: [n], added to their positions, and so to the key of their noise; None adds nothing.
        """
        values = {f.name: [getattr(self, f.name)[r] for r in rows] for f in fields(self)}
        if advance is not None:
            values["positions"] = [position + more for position, more in zip(values["positions"], advance)]
        return RowSampling(**values)


@dataclass(eq=False, slots=True)
class ChainSampling:
    """How the drafts of a chain's B sequences are drawn, where some are sampled, edited or subject to a confidence."""

    rows: RowSampling
    """[B]: sampling of the first draft; positions advance by one per draft."""
    edits: list[LogitEdits | None]
    """[B]: edits of the logits before they are sampled from; None for none."""
    min_confidence: list[float]
    """[B]: a sequence's chain ends before a draft whose distribution gives no token this probability. That looks at
    the distribution, never at the token drawn from it."""
    keep_probs: list[bool]
    """[B]: whether the sequence's rule needs the distributions that its drafts were drawn from."""


@dataclass(eq=False, slots=True)
class DraftChain:
    """What the MTP layer runs in one step of B sequences: their pending pairs, then drafts after the last ones."""

    input_ids: list[int]
    """[T]: the pairs' tokens, at `metadata`'s positions."""
    previous: list[HiddenRows]
    """The pairs' hidden states, T rows in any number of pieces."""
    metadata: AttentionMetadata
    """Where the pairs live in the MTP layer's cache."""
    kv_cache: Tensor
    """[1, pages, 2, page_size, Hkv, D]: the MTP layer's cache, which is appended to."""
    counts: list[int]
    """[B]: the most drafts of each sequence, at least 0."""
    recycle_unnormed: bool
    """Whether later drafts are fed the layer's output before the final norm instead of after it."""
    sampling: ChainSampling | None = None
    """How drafts are drawn; None where every draft is the argmax."""


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
    """[Q, K, V]: the distributions of the drafts that were drawn from one; None where there are none."""
    on_device: Tensor | None = None
    """[D, K] int64: the drafts of D sequences, padded with NOT_DRAFTED; None where the host has them."""
    device_rows: list[int] = field(default_factory=list)
    """[B]: each sequence's row of on_device; -1: it has no drafts."""

    @classmethod
    def of(cls, token_ids: list[list[int]]) -> Drafts:
        """Returns drafts of given tokens, each verified as a point mass: it is accepted with the probability that the
        target gives it.

        token_ids: [B] of up to K, chosen in any way that does not look at the noise of later tokens.
        """
        return cls(token_ids, [-1] * len(token_ids))

    @property
    def counts(self) -> list[int]:
        """[B]: how many drafts each sequence has, or may have at the most where they are on a device."""
        return [len(row) for row in self.token_ids]

    def select(self, sequences: list[int]) -> Drafts:
        """Returns the drafts of some sequences, by their numbers b; -1 gives a sequence without drafts."""
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
    """Allocates memory for the distributions of a chain's drafts.

    keep: [B], whether a sequence's distributions are kept.
    num_steps: the most drafts of a sequence.
    vocab_size, dtype, device: of the distributions.
    Returns `Drafts.probs` [Q, num_steps, vocab_size], None where nothing is kept, and `Drafts.prob_rows` [B].
    """
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
    """Drafts of the B sequences."""
    rules: list[int]
    """[B]: EXACT_MATCH, TOKEN_REJECTION or BLOCK_VERIFICATION."""
    rows: RowSampling
    """[B]: sampling of each sequence's first deciding row. Its further rows use the next positions; for the rejection
    rules the first position is also the noise key's `start`."""
    edits: list[LogitEdits | None]
    """[B]: edits of the logits before truncation; None for none."""
    keep_logits: bool = False
    """Whether `Verified.raw` and `processed` are filled."""

    def place(self, input_ids: list[int]) -> list[int]:
        """Returns the forward's tokens [T], with the drafts that the host knows in the places left for them."""
        placed = list(input_ids)
        for first, drafts in zip(self.first_rows, self.drafts.token_ids):
            # Where a draft is NOT_FINITE the sequence is lost, but its row must name some token.
            known = [max(token, 0) for token in drafts] if NOT_FINITE in drafts else drafts
            placed[first + 1 : first + 1 + len(known)] = known
        return placed


class Verified(NamedTuple):
    """What a target forward decided about B sequences. R rows decide: one more per sequence than it had drafts at the
    most."""

    hidden: Tensor
    """[T, H]: the target's hidden states, after its final norm."""
    token_ids: list[list[int]]
    """[B]: what each sequence emits, its accepted drafts and one token more, which is -1 where a row of logits that
    decides is not finite."""
    draft_token_ids: list[list[int]]
    """[B]: the drafts that there were, known by now wherever they were made; NOT_FINITE ends those of a draft model
    whose logits were not finite."""
    raw: Tensor | None = None
    """[R, V]: logits of all rows before edits and truncation; None unless `VerifyBatch.keep_logits`."""
    processed: Tensor | None = None
    """[R, V]: the same after edits and truncation, valid for the rows of emitted tokens."""


@dataclass(frozen=True, eq=False)
class Residuals:
    """n residual distributions over the vocabulary, up to a factor.

    Number i gives token x the mass max(0, scales[i] * p[p_rows[i], x] - q[q_rows[i], x]), and 0 at x = excluded[i].
    """

    p: Tensor
    """[R, V]: the target's probabilities."""
    p_rows: list[int]
    """[n]: rows of p."""
    scales: list[float]
    """[n]: factors of p."""
    q: Tensor | None
    """[Q, V]: the probabilities that drafts were drawn from; None where every draft is a point mass."""
    q_rows: list[int]
    """[n]: rows of q; -1 subtracts nothing."""
    excluded: list[int]
    """[n]: a token that gets no mass; -1 for none."""
