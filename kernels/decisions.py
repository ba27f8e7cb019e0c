"""What passes between the engine and a backend about tokens: how they are drawn, edited, drafted and verified. It is
plain data; `specdec.kernels.data` has what is about forwards.

What a step hands over is not frozen, which would triple the time to make it; nobody changes it all the same.

Shapes: T packed tokens (ragged over sequences), B sequences, K draft tokens, R rows of logits, H hidden, V vocabulary.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.data import AttentionMetadata, HiddenRows

GREEDY = -1
"""Stands in place of a noise stream: the token is the argmax."""
NOT_DRAFTED = -1
"""Stands in place of a draft's id: the chain ended before it."""
NOT_FINITE = -2
"""Stands in place of a draft's id: the draft model's logits were not finite."""
EXACT_MATCH, TOKEN_REJECTION, BLOCK_VERIFICATION = 0, 1, 2
"""Verification rules, see `specdec.kernels.rules`."""


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
        if not any(self.drafts.token_ids):
            return input_ids
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
