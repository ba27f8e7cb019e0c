"""Parameters that a user may give: validated, frozen; a wrong value raises ValueError with the limit and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

from specdec.checks import ChecksKeywords, require, require_bool, require_choice, require_int, require_number
from specdec.cost import CostTable

VerificationRule = Literal["coupled", "block", "token"]
DraftMode = Literal["sampled", "greedy"]
Recycling = Literal["post_norm", "pre_norm"]
NumSpeculativeTokens = int | Literal["auto"]

AUTO: Literal["auto"] = "auto"
MAX_SPECULATIVE_TOKENS = 8
MAX_COUNT = 2**63 - 1  # what the kernels count with is an int64
MIN_TEMPERATURE = 1e-5  # below it fp32 logits overflow, and the result is greedy anyway
MAX_TEMPERATURE = 1e30  # far above it 1 / temperature is 0 in fp32
SEED_LIMIT = 2**64
MAX_LOGIT_BIAS = 100.0
MAX_LOGPROBS = 100
MAX_SAMPLES = 128  # the most samples of one prompt, as in OpenAI's API
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 1e-5, 1e5  # beyond them fp32 logits overflow
MAX_PENALTY = 2.0  # the largest presence and frequency penalty, as in OpenAI's API


def _require_int_field(owner: Any, name: str, low: int, high: int | None = None, remedy: str = "") -> None:
    """Checks an integer field, and makes NumPy's integers Python's, which do not overflow."""
    value = getattr(owner, name)
    require_int(name, value, low, high, remedy)
    object.__setattr__(owner, name, int(value))


def _require_number_field(owner: Any, name: str, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Checks a number, and makes it Python's float: kernels know no fractions, nor NumPy's scalars."""
    value = getattr(owner, name)
    require_number(name, value, low, high, open_low=open_low)
    object.__setattr__(owner, name, float(value))


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    wrong = f"{name} = {value!r} must be a list or tuple"
    require(isinstance(value, Iterable) and not isinstance(value, bytes), wrong)
    try:
        return tuple(value)
    except TypeError as error:  # an array without dimensions calls itself iterable
        raise ValueError(wrong) from error


def _as_pairs(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Returns a mapping, or pairs, of token ids and numbers as pairs in ascending order of ids. Raises ValueError for
    anything else."""
    require(not isinstance(value, str), f"{name} = {value!r} must map token ids to numbers")
    pairs = _as_tuple(name, value.items() if isinstance(value, Mapping) else value)
    for pair in pairs:
        require(isinstance(pair, tuple) and len(pair) == 2, f"{name}: {pair!r} must be a token id and a number")
    ids = [token for token, _ in pairs]
    for token in ids:
        require_int(name, token, 0, remedy=": it is a token id")
    require(len(set(ids)) == len(ids), f"{name} = {value!r} names a token twice")
    return tuple(sorted((int(token), number) for token, number in pairs))


def _as_bad_word(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        require(value != "", "bad_words: '' must be a non-empty string or token ids")
        return value
    tokens = _as_tuple("bad_words", value)
    require(len(tokens) > 0, f"bad_words: {value!r} must be a non-empty string or token ids")
    for token in tokens:
        require_int("bad_words", token, 0, remedy=": it is a token id")
    return tuple(int(token) for token in tokens)


def _require_speculation(value: Any) -> None:
    require(
        value is None or isinstance(value, SpeculationParams),
        f"speculation = {value!r} must be a SpeculationParams or None",
    )


def require_default_recycling(recycling: Recycling, drafter: object) -> None:
    """Raises ValueError where the MTP layer's recycling is chosen although a drafter of the user's own drafts.

    recycling: what was chosen.
    drafter: the drafter, or its name, for the message.
    """
    require(
        recycling == "post_norm",
        f"mtp_recycling = {recycling!r} is about the MTP layer's drafts, and drafter = {drafter!r} drafts in its "
        "place: leave one of them out",
    )


@dataclass(frozen=True)
class SpeculationParams(ChecksKeywords):
    """How the MTP head drafts and how drafts are verified; the engine's default, or one request's own."""

    num_speculative_tokens: NumSpeculativeTokens = 3
    """K, draft tokens per step; 0 switches speculation off (no MTP work at all). "auto" chooses K for every step, 0
    included, from the measured cost of forwards and the acceptance so far; under "token" and "block" a seed then no
    longer reproduces its tokens (their distribution stays exact), see docs/draft_length.md."""
    verification: VerificationRule = "coupled"
    """The rule at temperature > 0; each keeps the target's distribution, see `specdec.kernels.rules`. "coupled",
    drafter-invariant coupling (Daliri et al. 2024): a request's tokens are a function of model, prompt, parameters and
    seed alone, whatever K and batch are. "block", block verification (Sun et al. 2024): the most tokens per step.
    "token", token rejection (Leviathan et al. 2023; Chen et al. 2023). Temperature 0 is always verified greedily."""
    draft_sampling: DraftMode = "sampled"
    """Drafts at temperature > 0: "sampled" draws them from the MTP distribution after the request's own transform;
    "greedy" takes its argmax and verifies it as a point mass."""
    min_draft_confidence: float = 0.0
    """A step drafts no further once no token has this probability in the MTP distribution (after the request's
    transform; at temperature 0, of the softmax). 0 never stops early."""

    def __post_init__(self) -> None:
        if not self.automatic:
            _require_int_field(
                self, "num_speculative_tokens", 0, MAX_SPECULATIVE_TOKENS,
                "; 0 switches it off, 'auto' chooses for every step",
            )  # fmt: skip
        require_choice("verification", self.verification, get_args(VerificationRule))
        require_choice("draft_sampling", self.draft_sampling, get_args(DraftMode))
        _require_number_field(self, "min_draft_confidence", 0.0, 1.0)

    @cached_property
    def automatic(self) -> bool:
        """Whether the draft length is chosen for every step."""
        return isinstance(self.num_speculative_tokens, str) and self.num_speculative_tokens == AUTO

    @cached_property
    def max_draft_tokens(self) -> int:
        """The most drafts of one step; 0 where speculation is off."""
        asked = self.num_speculative_tokens
        return MAX_SPECULATIVE_TOKENS if isinstance(asked, str) else asked


@dataclass(frozen=True)
class SamplingParams(ChecksKeywords):
    """How one request is sampled and when it ends.

    Logits pass through logit_bias, bad_words and min_tokens, repetition_penalty, presence_penalty and
    frequency_penalty, temperature, top_k, top_p, min_p, in this order (that of transformers), in drafting and in
    verification alike; penalties and bad words count the drafts before each position.

    Strings and lists are taken in the forms that users have them in, and kept as tuples.
    """

    n: int = 1
    """Number of samples of the prompt, which share the pages of its tokens. The first is what n = 1 gives; the seeds of
    the others are derived from its seed (`specdec.request.seeds.sample_seed`)."""
    max_tokens: int = 16
    """The most tokens that are generated."""
    min_tokens: int = 0
    """Number of tokens before which the request cannot end: until so many are generated, the tokens that would end it
    are impossible and stop strings are not sought."""
    temperature: float = 1.0
    """Divides the logits, 1e-5 to 1e30; 0 is greedy."""
    top_k: int = 0
    """Number of most probable tokens to sample among; 0 is off, and so is -1, which becomes 0."""
    top_p: float = 1.0
    """Probability that the most probable tokens, which are sampled among, must reach, as in transformers; 1 is off."""
    min_p: float = 0.0
    """Fraction of the most probable token's probability below which tokens are dropped, as in transformers; 0 is
    off."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in prompt and output, multiplies the negative ones, 1e-5 to 1e5; 1 is
    off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of the output's tokens; 0 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of the output's tokens, once per occurrence; 0 is off."""
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    """What is added to the logits of tokens, by token id: -100 to 100, or -inf, which makes a token impossible."""
    bad_words: str | Sequence[str | Sequence[int]] = ()
    """Texts, or sequences of token ids, that must not come about in prompt and output. A text stands for its tokens at
    the start of a line and after a space; the same text made of other tokens is not seen."""
    stop: str | Sequence[str] = ()
    """Strings that end the output: its text ends before the first of them (after it with include_stop_str_in_output).
    They are sought in the output's text, which has no special tokens under skip_special_tokens."""
    include_stop_str_in_output: bool = False
    """Whether the output's text has the stop string, or the text of the token, that ended it."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the output, beside the checkpoint's own end-of-text ids."""
    ignore_eos: bool = False
    """Whether the checkpoint's own end-of-text ids do not end the request."""
    skip_special_tokens: bool = True
    """Whether the output's text leaves special tokens out."""
    seed: int | None = None
    """Key of all random numbers, 0 <= seed < 2**64; None draws one and reports it."""
    logprobs: int | None = None
    """Number of most probable tokens whose log-probabilities are reported, beside those of every output token; None
    reports none."""
    speculation: SpeculationParams | None = None
    """The request's own speculation; None is the engine's."""

    def __post_init__(self) -> None:
        self._normalise()
        _require_int_field(self, "n", 1, MAX_SAMPLES, ": samples of one prompt")
        _require_int_field(self, "max_tokens", 1)
        _require_int_field(self, "min_tokens", 0, self.max_tokens, ": it is at most max_tokens")
        _require_number_field(self, "temperature", 0.0, math.inf)
        require(
            self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
            f"temperature = {self.temperature!r} must be 0 (greedy) or from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}",
        )
        _require_number_field(self, "top_p", 0.0, 1.0, open_low=True)
        _require_number_field(self, "min_p", 0.0, 1.0)
        _require_number_field(self, "repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        _require_number_field(self, "presence_penalty", -MAX_PENALTY, MAX_PENALTY)
        _require_number_field(self, "frequency_penalty", -MAX_PENALTY, MAX_PENALTY)
        for token, bias in self.biases:
            if bias != -math.inf:
                require_number(f"logit_bias of token {token}", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        object.__setattr__(self, "logit_bias", tuple((token, float(bias)) for token, bias in self.biases))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            require_bool(name, getattr(self, name))
        for text in self.stop_strings:
            require(isinstance(text, str) and text != "", f"stop = {text!r} must be a non-empty string")
        for token in self.stop_token_ids:
            require_int("stop_token_ids", token, 0)
        if self.seed is not None:
            _require_int_field(self, "seed", 0, SEED_LIMIT - 1)
        if self.logprobs is not None:
            _require_int_field(self, "logprobs", 0, MAX_LOGPROBS, "; 0 reports the output's tokens alone")
        _require_speculation(self.speculation)

    def _normalise(self) -> None:
        """Gives fields that are taken in several forms one: tuples, pairs in ascending order of ids, 0 for off."""
        words = (self.bad_words,) if isinstance(self.bad_words, str) else _as_tuple("bad_words", self.bad_words)
        object.__setattr__(self, "bad_words", tuple(_as_bad_word(word) for word in words))
        object.__setattr__(self, "stop", _as_tuple("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        object.__setattr__(
            self, "logit_bias", _as_pairs("logit_bias", () if self.logit_bias is None else self.logit_bias)
        )
        _require_int_field(self, "top_k", -1, remedy="; 0 or -1 switches it off")
        object.__setattr__(self, "top_k", max(self.top_k, 0))

    @property
    def greedy(self) -> bool:
        """Whether every token is the argmax: temperature is 0."""
        return self.temperature == 0

    @cached_property
    def row_law(self) -> tuple[float, int, float, float]:
        """The distribution of a row of logits: 1 / temperature, top_k, top_p, min_p; at temperature 0 the values that
        leave a row as it is."""
        if self.greedy:
            return 1.0, 0, 1.0, 0.0
        return 1 / self.temperature, min(self.top_k, MAX_COUNT), self.top_p, self.min_p

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """The pairs of logit_bias, by ascending token id."""
        return cast(tuple[tuple[int, float], ...], self.logit_bias)

    @property
    def banned_words(self) -> tuple[str | tuple[int, ...], ...]:
        """The texts and token sequences of bad_words."""
        return cast(tuple[str | tuple[int, ...], ...], self.bad_words)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings of stop."""
        return cast(tuple[str, ...], self.stop)

    @property
    def penalises(self) -> bool:
        """Whether any of the three penalties is on."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@dataclass(frozen=True)
class EngineConfig(ChecksKeywords):
    """Sizes and defaults of an engine."""

    speculation: SpeculationParams | None = None
    """Speculation of requests that bring none of their own; None means SpeculationParams() where the checkpoint has an
    MTP layer, plain decoding where it has none."""
    max_num_seqs: int = 16
    """The most requests in one step."""
    max_num_batched_tokens: int | None = None
    """The most tokens of one target forward; longer prompts are prefilled in chunks. None: 2048, or what max_num_seqs
    needs."""
    num_pages: int | None = None
    """Size of the KV cache in pages. With neither this nor kv_cache_bytes: room for max_num_seqs requests of
    max_model_len, at most 2 GiB."""
    kv_cache_bytes: int | None = None
    """Size of the KV cache in bytes, instead of num_pages."""
    page_size: int = 16
    """Tokens of a page."""
    max_model_len: int | None = None
    """The most tokens of prompt plus output; None: the checkpoint's positions, which it may not exceed."""
    prefix_caching: bool = True
    """Whether requests take over the full pages that others have computed of the same beginning; changes no token."""
    cost_table: CostTable | None = None
    """What forwards cost, for draft length "auto", whose choices then depend on no clock; None measures it once per
    process, when it is needed, and corrects it by the times that steps take."""
    mtp_recycling: Recycling = "post_norm"
    """What draft steps after the first take in place of the target's hidden state: the MTP layer's output after its
    final norm, or before it ("pre_norm", an ablation)."""
    cuda_graphs: bool = True
    """Whether decode steps on CUDA replay graphs that are captured at start-up; False launches every kernel anew."""

    def __post_init__(self) -> None:
        _require_speculation(self.speculation)
        _require_int_field(self, "max_num_seqs", 1, MAX_COUNT)
        _require_int_field(self, "page_size", 1, MAX_COUNT)
        require_int(
            "max_num_batched_tokens", self.token_budget, self._least_token_budget,
            remedy=f", so that every one of max_num_seqs = {self.max_num_seqs} requests can be verified in one step",
        )  # fmt: skip
        for name in ("num_pages", "kv_cache_bytes"):
            if getattr(self, name) is not None:
                _require_int_field(self, name, 1, MAX_COUNT)
        require(
            self.num_pages is None or self.kv_cache_bytes is None,
            f"num_pages = {self.num_pages} and kv_cache_bytes = {self.kv_cache_bytes} both size the cache: give one",
        )
        if self.max_model_len is not None:
            _require_int_field(self, "max_model_len", 2, MAX_COUNT)
        require_bool("prefix_caching", self.prefix_caching)
        require(
            self.cost_table is None or isinstance(self.cost_table, CostTable),
            f"cost_table = {self.cost_table!r} must be a CostTable or None",
        )
        require_bool("cuda_graphs", self.cuda_graphs)
        require_choice("mtp_recycling", self.mtp_recycling, get_args(Recycling))

    @property
    def token_budget(self) -> int:
        """The most tokens of one target forward: max_num_batched_tokens, or its default."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(2048, self._least_token_budget)

    @property
    def _least_token_budget(self) -> int:
        return self.max_num_seqs * (MAX_SPECULATIVE_TOKENS + 1)
