"""A certificate that speculation changes nothing: `specdec eval lossless`.

    python -m specdec.eval.lossless --small FOLDER [--seed 0]      a checkpoint of 8 tokens, for `make certify`

Three parts, all through the engine as it is:

- *sampling*: its outputs at temperature > 0 follow the target's exact law, which is computed here once more: a plain
  forward over every context that was visited, into a cache of its own, and the transforms of SamplingParams in fp64.
- *greedy*: at temperature 0 every output equals that of plain decoding alone.
- *coupled*: with coupled verification every sampled output equals that of plain decoding alone with the same seed.

**Statistics of the sampling part.** A *group* is one rule with one parameter combination. Each group has

- an e-process over contexts: a context c whose law is p, visited n times and followed n_v times by token v, contributes
  E_c = G(A) / G(A+n) * prod_v G(A p_v + n_v) / (G(A p_v) p_v^n_v), G the gamma function: how much better a
  Dirichlet(A p) mixture predicts the tokens than p does. The product over contexts is a martingale under p, whatever
  A is. A says how far from p the bet is (about 1/sqrt(A) in total variation); the mean over `CONCENTRATIONS` is bet
  on, so that A needs no choice. A context visited once contributes exactly 1.
- a pooled e-process, which needs no repeated context: at every token the vocabulary is cut into cells by rank under
  p, 1, 2-4, 5-16, 17-64 and the rest, whose probabilities P are known. A bet (a, theta) multiplies its stake by
  exp(theta a(cell)) / sum_k P_k exp(theta a(k)); the mean over all bets is an e-process. It reads the first
  samples of each group only, where all of them would be too much (their number depends on sizes, never on outcomes).
- G-tests (Williams' correction) of the contexts visited most after the first output token, cells with an expectation
  below 5 merged.

Each rule also has both e-processes over all its combinations together. With M tests in all, an e-process fails at
E >= M / alpha and a G-test at p <= alpha / M, so that a lossless engine fails anywhere with probability alpha at most
(exactly so for the e-processes; the G-tests' p-values are asymptotic). A token that is impossible under p is a failure
at once. Contexts where rounding decides what top_k, top_p or min_p cut are left out of the tests and counted: that
depends on the context alone, not on what followed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor

from specdec import Engine, GenerationOutput, SamplingParams, SpeculationParams
from specdec.batch import Extend, build_batch
from specdec.config import MAX_SPECULATIVE_TOKENS, MIN_TEMPERATURE, DraftSampling, Verification
from specdec.eval.prompts import load_stdlib
from specdec.kernels import select
from specdec.kernels.philox import gumbel_noise
from specdec.kv_cache import allocate_kv_cache, page_bytes
from specdec.loading import open_checkpoint
from specdec.model.config import ARCHITECTURE, Glm4MoeConfig, parse_config
from specdec.model.errors import CheckpointError
from specdec.model.hub import resolve_model
from specdec.model.layers import iter_slots
from specdec.model.weights import build_model, mtp_prefix
from specdec.rng import Stream

Ints = NDArray[np.int64]
Progress = Callable[[str, int, int], None]
"""(what is being done, how much of it is done, of how much)"""

RULES = get_args(Verification)
DRAFT_LENGTHS = (1, 2, 3, 4, 5)  # of the comparisons with plain decoding
BATCH_SIZES = (1, 3, 16)
NUM_ITERATIONS = 3  # speculative ones, at least, of every sample
PROMPT_TOKENS, RANDOM_PROMPT_TOKENS = 16, 4
MIN_VOCAB_SIZE = 8
MAX_SAMPLES, MAX_SEED = 2**32, 2**20

CONCENTRATIONS = (16.0, 256.0, 4096.0, 65536.0)
CELL_RANKS = (1, 4, 16, 64)
NUM_CELLS = len(CELL_RANKS) + 1
G_TESTS_PER_GROUP, G_TEST_VISITS, MIN_EXPECTED = 4, 50, 5.0
POWER, POWER_DRAWS, POWER_TOKENS = 0.99, 1000, 1000

ROUNDING = 64 * torch.finfo(torch.float32).eps  # relative: two correct computations of a probability may differ so much
TIE = 1e-3  # of the largest logit: kernels that are not row-invariant may choose either of two tokens this close
BATCH_ELEMENTS = 2**22  # of logits at once
POOLED_ELEMENTS, LAW_OVERHEAD = 2**31, 500  # of laws that the pooled e-processes read; what one costs beside its own
KV_BYTES = 2**28
MAX_EXAMPLES = 10


@dataclass(frozen=True)
class LosslessOptions:
    """What to certify. samples: engine outputs per rule. alpha: the probability that a lossless engine fails.

    num_speculative_tokens: K of the samples; the comparisons with plain decoding take `DRAFT_LENGTHS`.
    temperature: of the plain combination; the others' follow it. num_prompts: contexts that samples start from, few so
    that contexts come again; comparison_prompts: of the comparisons.
    max_num_seqs: requests in one step (None: 256, fewer with a large vocabulary).
    comparison_seeds, comparison_tokens: of each combination in the comparisons.
    """

    model: str = "bundled"
    kernels: str = "auto"
    dtype: str = "auto"
    num_threads: int | None = None
    samples: int = 5000
    alpha: float = 1e-6
    rules: tuple[str, ...] = RULES
    num_speculative_tokens: int = 3
    temperature: float = 1.0
    seed: int = 0
    num_prompts: int = 2
    comparison_prompts: int = 4
    max_num_seqs: int | None = None
    comparison_seeds: int = 2
    comparison_tokens: int = 24

    def __post_init__(self) -> None:
        for name, low, high in (
            ("samples", 100, MAX_SAMPLES),
            ("num_speculative_tokens", 1, MAX_SPECULATIVE_TOKENS),
            ("seed", 0, MAX_SEED - 1),
            ("num_prompts", 1, 64),
            ("comparison_prompts", 1, 64),
            ("comparison_seeds", 1, 1000),
            ("comparison_tokens", 2, 1000),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} = {getattr(self, name)} must be from {low} to {high}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha = {self.alpha} must be in (0, 1), the probability of a false failure")
        if not MIN_TEMPERATURE <= self.temperature <= 100:
            raise ValueError(
                f"temperature = {self.temperature} must be from {MIN_TEMPERATURE:g} to 100: greedy decoding is "
                "compared in any case"
            )
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise ValueError(f"rules = {','.join(self.rules)!r} must name at least one rule, and none twice")
        for rule in self.rules:
            if rule not in RULES:
                raise ValueError(f"rules: {rule!r} is unknown: choose among {', '.join(RULES)}")
        if self.max_num_seqs is not None and self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs = {self.max_num_seqs} must be at least 1")


@dataclass(frozen=True)
class Failure:
    """part: "sampling", "greedy" or "coupled". reproduce: prompt, parameters, seeds; JSON."""

    part: str
    message: str
    reproduce: dict[str, Any]


@dataclass(frozen=True)
class Detectable:
    """The smallest shift, in total variation, that the same data would have shown with probability `POWER`: mass moved
    from the most probable token to the others, or from them to it. None: no possible shift of that kind."""

    from_top: float | None
    to_top: float | None


@dataclass(frozen=True)
class GTest:
    """One context: prompt and `context`, output tokens after it. num_cells: after merging."""

    prompt: int
    context: list[int]
    visits: int
    num_cells: int
    p_value: float


@dataclass(frozen=True)
class GroupResult:
    """One rule with one combination, or (combination "all") with all of them. log10_e_*: inf after an impossible token.
    pooled_shift: of the pooled e-process, averaged over positions."""

    combination: str
    samples: int
    log10_e_contexts: float
    log10_e_pooled: float
    pooled_positions: int
    pooled_shift: Detectable
    g_tests: list[GTest]

    @property
    def log10_e(self) -> float:
        return max(self.log10_e_contexts, self.log10_e_pooled)

    @property
    def smallest_p(self) -> float:
        return min((test.p_value for test in self.g_tests), default=1.0)


@dataclass(frozen=True)
class RuleResult:
    """contexts: distinct (combination, context); repeated_contexts: of them, those visited more than once.
    rounded_contexts: left out, since rounding decides their law. few_iterations: samples with fewer than
    `NUM_ITERATIONS` verifications of drafts. context_shift: at the context visited most, `context_visits` times."""

    rule: str
    samples: int
    tokens: int
    iterations: int
    few_iterations: int
    mean_acceptance_length: float | None
    contexts: int
    repeated_contexts: int
    rounded_contexts: int
    impossible_tokens: int
    context_visits: int
    context_shift: Detectable
    groups: list[GroupResult]
    together: GroupResult

    @property
    def worst(self) -> GroupResult:
        return max([*self.groups, self.together], key=lambda group: group.log10_e)

    @property
    def smallest_p(self) -> float:
        return min(group.smallest_p for group in self.groups)


@dataclass(frozen=True)
class Sampling:
    """num_tests: M. A test fails at log10 E >= `log10_e_limit` or p <= `p_limit`."""

    num_tests: int
    log10_e_limit: float
    p_limit: float
    rules: list[RuleResult]


@dataclass(frozen=True)
class Difference:
    """An output that differs from plain decoding's. position: of the first token that does. margin: between the two
    tokens' scores there, in units of the largest logit; None where they do not explain it."""

    case: str
    prompt_token_ids: list[int]
    seed: int | None
    speculation: dict[str, Any]
    batch_size: int
    position: int
    plain_token: int
    token: int
    margin: float | None


@dataclass(frozen=True)
class Comparison:
    """Outputs compared with plain decoding alone, token for token. tie: the margin up to which a difference is
    put down to rounding; 0 on row-invariant kernels. examples: of the differences."""

    cases: int
    outputs: int
    tokens: int
    draft_lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    mean_acceptance_length: float | None
    tie: float
    different: int
    unexplained: int
    largest_margin: float
    examples: list[Difference]


@dataclass(frozen=True)
class Certificate:
    """coupled: None where that rule was not asked for. seconds: of the whole run."""

    options: LosslessOptions
    provenance: dict[str, Any]
    combinations: dict[str, dict[str, Any]]
    prompts: list[list[int]]
    sampling: Sampling
    greedy: Comparison
    coupled: Comparison | None
    failures: list[Failure]
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class Combination:
    """Parameters of requests, but for seed and speculation; and how their drafts are made."""

    name: str
    params: SamplingParams
    draft_sampling: DraftSampling = "sampled"
    min_draft_confidence: float = 0.0

    def speculation(self, rule: str, num_tokens: int) -> SpeculationParams:
        return SpeculationParams(num_tokens, cast(Verification, rule), self.draft_sampling, self.min_draft_confidence)

    def described(self) -> dict[str, Any]:
        """What is not a default; JSON."""
        ours, plain = asdict(self.params), asdict(SamplingParams())
        changed = {name: value for name, value in ours.items() if value != plain[name]}
        if "logit_bias" in changed:
            changed["logit_bias"] = {str(token): str(bias) for token, bias in self.params.biases}
        return changed | {"draft_sampling": self.draft_sampling, "min_draft_confidence": self.min_draft_confidence}


def combinations(vocab_size: int, probable: Seq[int], options: LosslessOptions) -> list[Combination]:
    """Eight that together use every parameter which changes the law. probable: six tokens that are, after a prompt."""
    k, t = options.num_speculative_tokens, options.temperature
    least = NUM_ITERATIONS * (k + 1) + 1  # the first token comes without drafts, later ones at most k + 1 at a time
    plain = SamplingParams(max_tokens=least, temperature=t, ignore_eos=True)
    a, b, c, d, e, f = probable
    top_k = min(50, 3 * vocab_size // 4)
    # No output ends before it has had its iterations; those that may draft nothing get more of them.
    cautious = replace(plain, max_tokens=least + k + 1)
    ending = replace(plain, max_tokens=least + 2, min_tokens=least, stop_token_ids=(e,))
    return [
        Combination("plain", plain),
        Combination("top_k, top_p", replace(plain, temperature=0.7 * t, top_k=top_k, top_p=0.9)),
        Combination("min_p", replace(cautious, min_p=0.1), min_draft_confidence=0.2),
        Combination("logit_bias", replace(plain, logit_bias={a: -1.5, b: 2.0, c: -math.inf, d: 0.5})),
        Combination("repetition", replace(plain, repetition_penalty=1.3)),
        Combination("presence, frequency", replace(plain, presence_penalty=0.7, frequency_penalty=0.4)),
        Combination("bad_words, min_tokens", replace(ending, bad_words=((a,), (b, c), (d, b, f)))),
        Combination("greedy drafts", replace(cautious, temperature=1.2 * t), "greedy", min_draft_confidence=0.2),
    ]


# --- The target's law, once more ---------------------------------------------------------------------------------


def edited_logits(logits: Tensor, prompt: Seq[int], output: Tensor, params: SamplingParams) -> Tensor:
    """logits [R, V] fp64 of the tokens after prompt [n] and output [R, d] -> [R, V]: with bias, bans and penalties,
    divided by the temperature. bad_words are token ids here; only stop_token_ids end a request."""
    rows, vocab_size = logits.shape
    z = logits.clone()
    for token, bias in params.biases:
        z[:, token] += bias
    context = torch.cat([torch.tensor(prompt).expand(rows, -1), output], 1)
    for *start, last in cast(tuple[tuple[int, ...], ...], params.bad_words):
        if len(start) <= context.shape[1]:
            before = context[:, context.shape[1] - len(start) :]
            z[(before == torch.tensor(start, dtype=torch.int64)).all(1), last] = -math.inf
    if output.shape[1] < params.min_tokens:
        z[:, list(params.stop_token_ids)] = -math.inf
    if params.repetition_penalty != 1:
        seen = torch.zeros(rows, vocab_size, dtype=torch.bool).scatter_(1, context, True)
        r = params.repetition_penalty
        z = torch.where(seen, torch.where(z > 0, z / r, z * r), z)
    if params.presence_penalty != 0 or params.frequency_penalty != 0:
        ones = torch.ones_like(output, dtype=z.dtype)
        counts = torch.zeros(rows, vocab_size, dtype=z.dtype).scatter_add_(1, output, ones)
        z = z - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
    return z / params.temperature if params.temperature > 0 else z


def truncated_probs(z: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """z [R, V] after `edited_logits` -> probabilities [R, V] after top_k, top_p and min_p, and [R] bool: whether
    rounding could have cut at another token."""
    rounded = torch.zeros(len(z), dtype=torch.bool)
    if 0 < params.top_k < z.shape[1]:
        largest = z.topk(params.top_k + 1).values
        kth, next_ = largest[:, -2:].unbind(1)
        rounded |= (kth - next_ <= ROUNDING * largest[:, 0].abs().clamp(min=1)) & next_.isfinite()
        z = z.masked_fill(z < kth[:, None], -math.inf)
    p = z.softmax(1)
    if params.top_p < 1:
        ordered, ids = p.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(1) - ordered
        kept = before < params.top_p
        rounded |= (((before - params.top_p).abs() <= ROUNDING) & (ordered > 0)).any(1)
        last = kept.sum(1, keepdim=True)
        at_cut = ordered.gather(1, torch.cat([last - 1, last.clamp(max=z.shape[1] - 1)], 1))
        rounded |= (at_cut[:, 0] - at_cut[:, 1] <= ROUNDING * at_cut[:, 0]) & (last[:, 0] < z.shape[1])
        z = z.masked_fill(~torch.zeros_like(kept).scatter(1, ids, kept), -math.inf)
        p = z.softmax(1)
    if params.min_p > 0:
        limit = params.min_p * p.amax(1, keepdim=True)
        rounded |= ((p - limit).abs() <= ROUNDING * limit).any(1) & (params.min_p < 1)
        p = z.masked_fill(p < limit, -math.inf).softmax(1)
    return p, rounded


class PlainTarget:
    """The target alone: plain forwards into a cache of its own, with pages of one token, so that contexts share the
    pages of what they have in common."""

    def __init__(self, engine: Engine, num_pages: int) -> None:
        self.model, cache = engine.runtime.model.target, engine.runtime.kv_cache
        config = self.model.config
        self.cache = allocate_kv_cache(config, config.num_hidden_layers, num_pages, 1, cache.dtype, cache.device)

    @torch.inference_mode()
    def logits(self, extends: Seq[Extend]) -> Tensor:
        """The logits after the last token of each extend, [B, V] fp64."""
        batch = build_batch(extends, 1, self.cache.device)
        hidden = self.model(batch.input_ids, batch.positions, batch.metadata, self.cache)
        last = [start + n - 1 for start, n in zip(batch.row_starts, batch.metadata.query_lens)]
        return self.model.compute_logits(hidden[last]).double().cpu()

    def logits_after(self, token_ids: list[int]) -> Tensor:
        """[1, V]; overwrites the first pages."""
        return self.logits([Extend(token_ids, 0, list(range(len(token_ids))))])


# --- e-processes and tests ---------------------------------------------------------------------------------------


def token_terms(p: Tensor, n: Tensor) -> Tensor:
    """Probabilities p [m] and counts n [m] of tokens -> their shares of log E_c, [m, concentrations]; inf at p = 0."""
    a = torch.tensor(CONCENTRATIONS, dtype=torch.float64)
    p, n = p.double()[:, None], n.double()[:, None]
    terms = torch.lgamma(a * p + n) - torch.lgamma(a * p) - n * p.log()
    return terms.masked_fill(p == 0, math.inf)


def context_terms(n: Tensor) -> Tensor:
    """Visits n [m] of contexts -> the other share of log E_c, [m, concentrations]."""
    a = torch.tensor(CONCENTRATIONS, dtype=torch.float64)
    return torch.lgamma(a) - torch.lgamma(a + n.double()[:, None])


def log_mixture(log_e: Tensor) -> Tensor:
    """log of the mean of e-values, over the last dimension."""
    return log_e.logsumexp(-1) - math.log(log_e.shape[-1])


def log_e_of_context(p: Tensor, counts: Tensor) -> Tensor:
    """p [V], counts [..., V] -> log E_c of each, the mean over concentrations."""
    rows = counts.reshape(-1, counts.shape[-1])
    row, token = rows.nonzero(as_tuple=True)
    log_e = context_terms(rows.sum(-1)).index_add(0, row, token_terms(p[token], rows[row, token]))
    return log_mixture(log_e).view(counts.shape[:-1])


def _bets() -> tuple[Tensor, Tensor]:
    """theta * a(cell), [bets, cells], and exp of it: for and against each cell, and high ranks against low ones."""
    directions = [*torch.eye(NUM_CELLS, dtype=torch.float64), torch.linspace(0, 1, NUM_CELLS, dtype=torch.float64)]
    sizes = [sign * theta for theta in (0.01, 0.03, 0.1, 0.3, 1.0) for sign in (1, -1)]
    tilts = torch.stack([theta * direction for direction in directions for theta in sizes])
    return tilts, tilts.exp()


TILTS, TILT_FACTORS = _bets()


def cell_probs(p: Tensor) -> tuple[Tensor, Tensor]:
    """p [R, V] -> the cells' probabilities [R, cells], and [R, cells - 1]: the least probability that is in a cell or
    in one before it. Tokens that tie with that are in it too."""
    largest = p.topk(min(CELL_RANKS[-1] + 1, p.shape[1])).values
    ends = [min(rank, p.shape[1]) - 1 for rank in CELL_RANKS]
    limits, after = largest[:, ends], torch.nn.functional.pad(largest, (0, 1))[:, [end + 1 for end in ends]]
    up_to = largest.cumsum(1)[:, ends]
    for row in ((limits == after) & (limits > 0)).any(1).nonzero()[:, 0].tolist():
        up_to[row] = torch.stack([p[row][p[row] >= limit].sum() for limit in limits[row]])
    up_to = torch.cat([up_to, torch.ones(len(p), 1, dtype=p.dtype)], 1)
    return up_to.diff(dim=1, prepend=torch.zeros(len(p), 1, dtype=p.dtype)).clamp(min=0), limits


@dataclass
class PooledProcess:
    """What the pooled e-process has seen. cells: how often each cell came; log_norms [bets]: of all stakes' factors.

    expected, covariance: of `cells` under the law. from_top, to_top: what changes in `expected` when all of the first
    cell's mass moves to the others, or the other way.
    """

    positions: int = 0
    cells: Tensor = field(default_factory=lambda: torch.zeros(NUM_CELLS, dtype=torch.float64))
    log_norms: Tensor = field(default_factory=lambda: torch.zeros(len(TILTS), dtype=torch.float64))
    expected: Tensor = field(default_factory=lambda: torch.zeros(NUM_CELLS, dtype=torch.float64))
    covariance: Tensor = field(default_factory=lambda: torch.zeros(NUM_CELLS, NUM_CELLS, dtype=torch.float64))
    from_top: Tensor = field(default_factory=lambda: torch.zeros(NUM_CELLS, dtype=torch.float64))

    def add_laws(self, probs: Tensor, visits: Tensor) -> None:
        """probs [R, cells] of laws under which `visits` [R] tokens were emitted."""
        weighted = probs * visits[:, None]
        self.positions += int(visits.sum())
        self.log_norms += visits @ (probs @ TILT_FACTORS.T).log()
        self.expected += weighted.sum(0)
        self.covariance += weighted.sum(0).diag() - weighted.T @ probs
        others = probs.clone()
        others[:, 0] = 0
        moved = others / others.sum(1, keepdim=True).clamp(min=1e-300) * weighted[:, :1]
        moved[:, 0] = -moved.sum(1)
        self.from_top += moved.sum(0)

    def add_cells(self, cells: Tensor, counts: Tensor) -> None:
        """Tokens in cells [m], `counts` [m] of each."""
        self.cells += torch.bincount(cells, counts.double(), minlength=NUM_CELLS)

    @property
    def to_top(self) -> Tensor:
        moved = -self.expected
        moved[0] = self.expected[1:].sum()
        return moved

    def log_e(self, cells: Tensor | None = None) -> Tensor:
        """Of what was seen, or of other counts [..., cells]."""
        cells = self.cells if cells is None else cells
        return log_mixture(cells @ TILTS.T - self.log_norms)

    def plus(self, other: PooledProcess) -> PooledProcess:
        return PooledProcess(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def g_test(p: Tensor, counts: Tensor) -> tuple[Tensor, int]:
    """p [V], counts [..., V], each summing to the same n -> p-values [...], and the number of cells after merging
    (1: there is nothing to test)."""
    n = counts.sum(-1).flatten()[0].double()
    expected = n * p
    large = expected >= MIN_EXPECTED
    cells, observed = expected[large], counts[..., large].double()
    rest, seen = expected[~large].sum(), counts[..., ~large].double().sum(-1)
    if rest >= MIN_EXPECTED or len(cells) == 0:
        cells, observed = torch.cat([cells, rest[None]]), torch.cat([observed, seen[..., None]], -1)
    elif rest > 0:
        smallest = int(cells.argmin())
        cells[smallest] += rest
        observed[..., smallest] += seen
    if len(cells) < 2:
        return torch.ones(counts.shape[:-1], dtype=torch.float64), 1
    g = 2 * torch.xlogy(observed, observed / cells).sum(-1)
    freedom = len(cells) - 1
    g = g / (1 + ((n / cells).sum() - 1) / (6 * n * freedom))
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    return torch.special.gammaincc(half.expand_as(g), g.clamp(min=0) / 2), len(cells)


def smallest_shift(detected: Callable[[float], float], most: float) -> float | None:
    """The smallest shift in (0, most] that `detected` finds with probability `POWER`, by bisection to 1 %."""
    if most <= 0 or detected(most) < POWER:
        return None
    low, high = 0.0, most
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if detected(middle) >= POWER else (middle, high)
    return high


def shifted(p: Tensor, shift: float, *, to_top: bool) -> Tensor:
    """p [V] with `shift` of its mass moved from the most probable token to the others in proportion, or back."""
    top = int(p.argmax())
    others = p.clone()
    others[top] = 0
    others = others / others.sum().clamp(min=1e-300)
    moved = shift * (torch.nn.functional.one_hot(torch.tensor(top), len(p)) - others)
    return (p + (moved if to_top else -moved)).clamp(min=0)


def context_detectable(p: Tensor, visits: int, log_e_limit: float, p_limit: float, seed: int = 0) -> Detectable:
    """At a context with law p [V] that is visited so often, by its e-process or its G-test. Beyond the `POWER_TOKENS`
    most probable ones, tokens count as one."""
    generator = np.random.default_rng(seed)
    p = p[p > 0].sort(descending=True).values

    def few(law: Tensor) -> Tensor:
        return law if len(p) <= POWER_TOKENS else torch.cat([law[:POWER_TOKENS], law[POWER_TOKENS:].sum()[None]])

    def power(shift: float, to_top: bool) -> float:
        law = few(shifted(p, shift, to_top=to_top)).numpy()
        counts = torch.from_numpy(generator.multinomial(visits, law / law.sum(), POWER_DRAWS))
        found = (log_e_of_context(few(p), counts) >= log_e_limit) | (g_test(few(p), counts)[0] <= p_limit)
        return float(found.double().mean())

    if visits == 0 or len(p) < 2:
        return Detectable(None, None)
    top = float(p.max())
    return Detectable(
        smallest_shift(lambda shift: power(shift, False), top),
        smallest_shift(lambda shift: power(shift, True), 1 - top),
    )


def pooled_detectable(process: PooledProcess, log_e_limit: float, seed: int = 0) -> Detectable:
    """By the pooled e-process, whose counts are nearly normal; the same share of every position's mass moves."""
    if process.positions == 0:
        return Detectable(None, None)
    generator = torch.Generator().manual_seed(seed)
    values, vectors = torch.linalg.eigh(process.covariance)
    noise = torch.randn(POWER_DRAWS, NUM_CELLS, dtype=torch.float64, generator=generator)
    noise = noise @ (vectors * values.clamp(min=0).sqrt()).T

    def smallest(moved: Tensor) -> float | None:
        """moved [cells]: what changes in the expected counts when all moves."""
        total = float(moved.clamp(min=0).sum()) / process.positions

        def power(shift: float) -> float:
            counts = process.expected + shift / total * moved + noise
            return float((process.log_e(counts) >= log_e_limit).double().mean())

        return smallest_shift(power, total)

    return Detectable(smallest(process.from_top), smallest(process.to_top))


# --- Contexts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """The contexts with the same number of output tokens after one prompt, in lexicographic order.

    parent, token [nodes]: the context before its last token, in the level before, and that token. Visits, sorted by
    (node, group, token): a `count` [m] of samples of `group` went on with `token`, `pooled` of them among those that
    the pooled e-processes read.
    """

    parent: Ints
    token: Ints
    node: Ints
    group: Ints
    next_token: Ints
    count: Ints
    pooled: Ints

    def visits(self) -> tuple[Ints, Ints, Ints]:
        """node, group, number of samples, of every visited (context, group)."""
        new = (np.diff(self.node, prepend=-1) != 0) | (np.diff(self.group, prepend=-1) != 0)
        first = np.flatnonzero(new)
        return self.node[first], self.group[first], np.add.reduceat(self.count, first) if len(first) else self.count

    def only(self, kept: NDArray[np.bool_]) -> Level:
        """The same for some of its contexts, renumbered."""
        visited, number = kept[self.node], np.cumsum(kept) - 1
        visits = [v[visited] for v in (self.group, self.next_token, self.count, self.pooled)]
        return Level(self.parent[kept], self.token[kept], number[self.node[visited]], *visits)


def build_levels(
    tokens: Ints, groups: Ints, pooled: NDArray[np.bool_], num_groups: int, vocab_size: int
) -> tuple[list[Level], Ints]:
    """Outputs [n, L] of one prompt, -1 after their ends, with the group of each and whether it is pooled -> their
    contexts, and [groups] how many. Left out are contexts that no group visits twice and no pooled sample visits: they
    decide nothing."""
    alive = np.arange(len(tokens))
    node = np.zeros(len(tokens), np.int64)  # of each sample that is alive
    parent, token, levels = np.zeros(1, np.int64), np.full(1, -1, np.int64), []
    num_contexts = np.zeros(num_groups, np.int64)
    for depth in range(tokens.shape[1]):
        going = tokens[alive, depth] >= 0
        alive, node = alive[going], node[going]
        if len(alive) == 0:
            break
        next_token = tokens[alive, depth].astype(np.int64)
        key = (node * num_groups + groups[alive]) * vocab_size + next_token
        triples, inverse, count = np.unique(key, return_inverse=True, return_counts=True)
        from_pool = np.bincount(inverse, pooled[alive], minlength=len(triples)).astype(np.int64)
        pairs = triples // vocab_size
        level = Level(parent, token, pairs // num_groups, pairs % num_groups, triples % vocab_size, count, from_pool)
        at, group, visits = level.visits()
        num_contexts += np.bincount(group, minlength=num_groups)
        kept = np.zeros(len(parent), np.bool_)
        kept[at[visits > 1]] = True
        kept[level.node[from_pool > 0]] = True
        levels.append(level.only(kept))
        going = kept[node]
        alive, node = alive[going], (np.cumsum(kept) - 1)[node[going]]
        children, node = np.unique(node * vocab_size + next_token[going], return_inverse=True)
        parent, token = children // vocab_size, children % vocab_size
    return levels, num_contexts


def visit_contexts(
    target: PlainTarget, prompt: list[int], levels: list[Level], width: int
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Every context once, up to `width` of a level at a time -> depth, the first node, logits [R, V], outputs [R, d].

    Depth first, so that `width` pages per level are enough, whatever the number of contexts.
    """

    def walk(depth: int, low: int, high: int, first: int, tables: list[list[int]], outputs: Ints) -> Any:
        """Nodes low to high of a level; tables and outputs are those of the nodes before them, from `first` on."""
        level = levels[depth]
        base = len(prompt) + (depth - 1) * width
        for start in range(low, high, width):
            stop = min(start + width, high)
            parents, tokens = level.parent[start:stop] - first, level.token[start:stop]
            ours = [[*tables[p], base + i] for i, p in enumerate(parents.tolist())]
            extends = [Extend([t], len(prompt) + depth - 1, table) for t, table in zip(tokens.tolist(), ours)]
            context = np.concatenate([outputs[parents], tokens[:, None]], 1)
            yield depth, start, target.logits(extends), torch.from_numpy(context)
            yield from descend(depth, start, stop, ours, context)

    def descend(depth: int, start: int, stop: int, tables: list[list[int]], outputs: Ints) -> Any:
        if depth + 1 < len(levels):
            low, high = np.searchsorted(levels[depth + 1].parent, [start, stop]).tolist()
            yield from walk(depth + 1, low, high, start, tables, outputs)

    pages, nothing = list(range(len(prompt))), np.zeros((1, 0), np.int64)
    yield 0, 0, target.logits([Extend(prompt, 0, pages)]), torch.from_numpy(nothing)
    yield from descend(0, 0, 1, [pages], nothing)


# --- Part A: the sampling law ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What the parts share. Sample i of a rule has combination i % C and prompt i // C % P, and its own seed."""

    options: LosslessOptions
    engine: Engine
    prompts: list[list[int]]  # of the samples
    comparison_prompts: list[list[int]]
    combinations: list[Combination]

    @property
    def vocab_size(self) -> int:
        return self.engine.checkpoint.config.vocab_size

    @property
    def longest(self) -> int:
        return max(c.params.max_tokens for c in self.combinations)

    def request(self, sample: int) -> tuple[int, int]:
        """-> combination, prompt."""
        return sample % len(self.combinations), sample // len(self.combinations) % len(self.prompts)

    def seed(self, rule: str, sample: int) -> int:
        return (self.options.seed * len(RULES) + RULES.index(cast(Verification, rule))) * MAX_SAMPLES + sample

    @property
    def num_pooled(self) -> int:
        """Samples of each rule that the pooled e-processes read."""
        laws = len(self.options.rules) * self.longest
        return min(self.options.samples, max(100, POOLED_ELEMENTS // (laws * (self.vocab_size + LAW_OVERHEAD))))


@dataclass
class Samples:
    """Outputs of one rule: tokens [n, L], -1 after the end."""

    rule: str
    tokens: NDArray[np.int32]
    iterations: int = 0
    accepted: int = 0
    few_iterations: int = 0


def draw_samples(plan: Plan, rule: str, progress: Progress) -> Samples:
    options = plan.options
    templates = [
        replace(c.params, speculation=c.speculation(rule, options.num_speculative_tokens)) for c in plan.combinations
    ]
    samples = Samples(rule, np.full((options.samples, plan.longest), -1, np.int32))
    block = 8 * plan.engine.config.max_num_seqs
    for start in range(0, options.samples, block):
        progress(f"sampling, {rule}", start, options.samples)
        chosen = range(start, min(start + block, options.samples))
        requests = [plan.request(i) for i in chosen]
        outputs = plan.engine.generate(
            [plan.prompts[p] for _, p in requests],
            [replace(templates[c], seed=plan.seed(rule, i)) for i, (c, _) in zip(chosen, requests)],
        )
        for i, output in zip(chosen, outputs):
            samples.tokens[i, : len(output.token_ids)] = output.token_ids
            samples.iterations += output.stats.num_drafts
            samples.accepted += output.stats.num_accepted_tokens
            samples.few_iterations += output.stats.num_drafts < NUM_ITERATIONS
    return samples


@dataclass
class Accounts:
    """What the walk over all contexts adds up, per group g = combination * rules + rule.

    log_e [groups, concentrations]. watched: (prompt, depth) -> (node, group) of each G-test there; laws of each
    group: prompt, output tokens, p [V] and counts [V] of these. examples: of impossible tokens, as (group,
    prompt, output tokens, token).
    """

    num_groups: int
    log_e: Tensor = field(init=False)
    pooled: list[PooledProcess] = field(init=False)
    rounded: Ints = field(init=False)
    impossible: Ints = field(init=False)
    watched: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    laws: dict[int, list[tuple[int, list[int], Tensor, Tensor]]] = field(init=False)
    examples: list[tuple[int, int, list[int], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.log_e = torch.zeros(self.num_groups, len(CONCENTRATIONS), dtype=torch.float64)
        self.pooled = [PooledProcess() for _ in range(self.num_groups)]
        self.rounded, self.impossible = np.zeros((2, self.num_groups), np.int64)
        self.laws = {group: [] for group in range(self.num_groups)}


def watch(levels: list[list[Level]], accounts: Accounts) -> None:
    """Chooses the contexts of the G-tests: those that most samples of a group visit, after a first token."""
    candidates: list[list[tuple[int, int, int, int]]] = [[] for _ in range(accounts.num_groups)]
    for prompt, of_prompt in enumerate(levels):
        for depth, level in enumerate(of_prompt[1:], 1):
            node, group, visits = level.visits()
            for g in range(accounts.num_groups):
                ours = np.flatnonzero((group == g) & (visits >= G_TEST_VISITS))
                most = ours[np.argsort(-visits[ours], kind="stable")[:G_TESTS_PER_GROUP]]
                candidates[g] += [(-int(visits[i]), prompt, depth, int(node[i])) for i in most]
    for g, found in enumerate(candidates):
        for _, prompt, depth, context in sorted(found)[:G_TESTS_PER_GROUP]:
            accounts.watched.setdefault((prompt, depth), []).append((context, g))


def account(
    plan: Plan, prompt: int, level: Level, depth: int, first: int, logits: Tensor, outputs: Tensor, accounts: Accounts
) -> None:
    """Adds the contexts `first`.. of a level, with logits [R, V] and output tokens [R, d]."""
    num_rules = len(plan.options.rules)
    here = slice(*np.searchsorted(level.node, [first, first + len(logits)]).tolist())
    combination = level.group[here] // num_rules
    for c in np.unique(combination).tolist():
        ours = np.flatnonzero(combination == c) + here.start
        rows, row = np.unique(level.node[ours] - first, return_inverse=True)
        params = plan.combinations[c].params
        z = edited_logits(logits[rows], plan.prompts[prompt], outputs[rows], params)
        p, rounded = truncated_probs(z, params)
        group, token = level.group[ours], torch.from_numpy(level.next_token[ours])
        count, at = torch.from_numpy(level.count[ours]), torch.from_numpy(row)
        p_token = p[at, token]
        outside = ((p_token == 0) & ~rounded[at]) | (z[at, token] == -math.inf)
        terms = token_terms(p_token, count).masked_fill(rounded[at][:, None], 0).masked_fill(outside[:, None], math.inf)
        accounts.log_e.index_add_(0, torch.from_numpy(group), terms)
        for i in outside.nonzero()[:, 0].tolist():
            accounts.impossible[group[i]] += int(count[i])
            if len(accounts.examples) < MAX_EXAMPLES:
                accounts.examples.append((int(group[i]), prompt, outputs[rows[row[i]]].tolist(), int(token[i])))
        for g in np.unique(group).tolist():
            of_group = torch.from_numpy(np.flatnonzero(group == g))
            visits = torch.bincount(at[of_group], count[of_group].double(), minlength=len(rows))
            accounts.rounded[g] += int((rounded & (visits > 0)).sum())
            usable = (visits > 0) & ~rounded
            accounts.log_e[g] += context_terms(visits[usable]).sum(0)
        usable_entries = ~rounded[at] & (torch.from_numpy(level.pooled[ours]) > 0) & ~outside
        _account_pooled(p, at[usable_entries], token[usable_entries], level, ours[usable_entries.numpy()], accounts)
        for context, g in accounts.watched.get((prompt, depth), ()):
            i = int(np.searchsorted(rows, context - first))
            if g // num_rules == c and i < len(rows) and rows[i] == context - first and not rounded[i]:
                entries = torch.from_numpy(np.flatnonzero((group == g) & (row == i)))
                counts = torch.zeros(p.shape[1], dtype=torch.int64)
                counts[token[entries]] = count[entries]
                accounts.laws[g].append((prompt, outputs[rows[i]].tolist(), p[i].clone(), counts))


def _account_pooled(p: Tensor, at: Tensor, token: Tensor, level: Level, entries: Ints, accounts: Accounts) -> None:
    """Rows `at` [m] of the laws p [R, V] went on with `token` [m], as the level's `entries` say."""
    if len(entries) == 0:
        return
    probs, limits = cell_probs(p)
    cells = (p[at, token][:, None] < limits[at]).sum(1)
    group, count = torch.from_numpy(level.group[entries]), torch.from_numpy(level.pooled[entries]).double()
    for g in group.unique().tolist():
        ours = group == g
        visits = torch.bincount(at[ours], count[ours], minlength=len(p))
        accounts.pooled[g].add_laws(probs[visits > 0], visits[visits > 0])
        accounts.pooled[g].add_cells(cells[ours], count[ours])


def certify_sampling(plan: Plan, progress: Progress) -> tuple[Sampling, list[Failure]]:
    options, num_combinations, num_rules = plan.options, len(plan.combinations), len(plan.options.rules)
    samples = [draw_samples(plan, rule, progress) for rule in options.rules]
    accounts = Accounts(num_combinations * num_rules)
    number = np.arange(options.samples)
    levels: list[list[Level]] = []
    contexts, repeated = np.zeros((2, accounts.num_groups), np.int64)
    for prompt in range(len(plan.prompts)):
        ours = number[number // num_combinations % len(plan.prompts) == prompt]
        tokens = np.concatenate([s.tokens[ours] for s in samples])
        rules = np.repeat(np.arange(num_rules), len(ours))
        groups = np.tile(ours % num_combinations, num_rules) * num_rules + rules
        pooled = np.tile(ours < plan.num_pooled, num_rules)
        of_prompt, found = build_levels(tokens, groups, pooled, accounts.num_groups, plan.vocab_size)
        levels.append(of_prompt)
        contexts += found
        for level in of_prompt:
            _, group, visits = level.visits()
            repeated += np.bincount(group[visits > 1], minlength=accounts.num_groups)
    watch(levels, accounts)
    _walk_all(plan, levels, accounts, progress)
    return _conclude(plan, samples, accounts, contexts, repeated, progress)


def _walk_all(plan: Plan, levels: list[list[Level]], accounts: Accounts, progress: Progress) -> None:
    cache, config = plan.engine.runtime.kv_cache, plan.engine.checkpoint.config
    page = page_bytes(config, config.num_hidden_layers, 1, cache.dtype)
    width = max(1, min(8192, BATCH_ELEMENTS // plan.vocab_size, KV_BYTES // (page * plan.longest)))
    target = PlainTarget(plan.engine, max(map(len, plan.prompts)) + plan.longest * width)
    total, done = sum(len(level.parent) for of_prompt in levels for level in of_prompt), 0
    for prompt, of_prompt in enumerate(levels):
        for depth, first, logits, outputs in visit_contexts(target, plan.prompts[prompt], of_prompt, width):
            progress("laws of the contexts", done, total)
            account(plan, prompt, of_prompt[depth], depth, first, logits, outputs, accounts)
            done += len(logits)


def _conclude(
    plan: Plan, samples: list[Samples], accounts: Accounts, contexts: Ints, repeated: Ints, progress: Progress
) -> tuple[Sampling, list[Failure]]:
    options, num_rules = plan.options, len(samples)
    tests = {g: [t for law in laws if (t := _g_test(*law)).num_cells > 1] for g, laws in accounts.laws.items()}
    num_tests = 2 * (accounts.num_groups + num_rules) + sum(map(len, tests.values()))
    log_e_limit, p_limit = math.log(num_tests / options.alpha), options.alpha / num_tests

    def group_result(name: str, groups: list[int]) -> GroupResult:
        pooled = accounts.pooled[groups[0]]
        for g in groups[1:]:
            pooled = pooled.plus(accounts.pooled[g])
        number = np.arange(options.samples) % len(plan.combinations)
        return GroupResult(
            combination=name,
            samples=int(np.isin(number, [g // num_rules for g in groups]).sum()),
            log10_e_contexts=float(log_mixture(accounts.log_e[groups].sum(0))) / math.log(10),
            log10_e_pooled=float(pooled.log_e()) / math.log(10),
            pooled_positions=pooled.positions,
            pooled_shift=pooled_detectable(pooled, log_e_limit),
            g_tests=[test for g in groups for test in tests[g]] if len(groups) == 1 else [],
        )

    rules = []
    for r, s in enumerate(samples):
        progress("detection power", r, num_rules)
        groups = [c * num_rules + r for c in range(len(plan.combinations))]
        laws = [law for g in groups for law in accounts.laws[g]]
        p, visits = max(((p, int(n.sum())) for _, _, p, n in laws), key=lambda x: x[1], default=(torch.ones(1), 0))
        rules.append(
            RuleResult(
                rule=s.rule,
                samples=len(s.tokens),
                tokens=int((s.tokens >= 0).sum()),
                iterations=s.iterations,
                few_iterations=s.few_iterations,
                mean_acceptance_length=1 + s.accepted / s.iterations if s.iterations else None,
                contexts=int(contexts[groups].sum()),
                repeated_contexts=int(repeated[groups].sum()),
                rounded_contexts=int(accounts.rounded[groups].sum()),
                impossible_tokens=int(accounts.impossible[groups].sum()),
                context_visits=visits,
                context_shift=context_detectable(p, visits, log_e_limit, p_limit),
                groups=[group_result(c.name, [g]) for c, g in zip(plan.combinations, groups)],
                together=group_result("all", groups),
            )
        )
    sampling = Sampling(num_tests, log_e_limit / math.log(10), p_limit, rules)
    return sampling, [*_impossible(plan, samples, accounts), *_unlikely(plan, sampling)]


def _g_test(prompt: int, context: list[int], p: Tensor, counts: Tensor) -> GTest:
    p_value, num_cells = g_test(p, counts)
    return GTest(prompt, context, int(counts.sum()), num_cells, float(p_value))


def _impossible(plan: Plan, samples: list[Samples], accounts: Accounts) -> Iterator[Failure]:
    """Tokens that no correct engine emits, each with the first sample that has it."""
    for group, prompt, context, token in accounts.examples:
        c, r = divmod(group, len(samples))
        start = np.array([*context, token])
        for i in np.flatnonzero((samples[r].tokens[:, : len(start)] == start).all(1)).tolist():
            if plan.request(i) == (c, prompt):
                name = plan.combinations[c].name
                message = f"{samples[r].rule}, {name}: token {token} is impossible after output {context}"
                seeds = {"seed": plan.seed(samples[r].rule, i), "output_token_ids": start.tolist()}
                yield Failure("sampling", message, _reproduce(plan, samples[r].rule, c) | seeds)
                break


def _unlikely(plan: Plan, sampling: Sampling) -> Iterator[Failure]:
    for rule in sampling.rules:
        for c, group in enumerate([*rule.groups, rule.together]):
            where = f"{rule.rule}, {group.combination}"
            reproduce = _reproduce(plan, rule.rule, c if c < len(rule.groups) else None)
            for name, value in (("contexts", group.log10_e_contexts), ("pooled", group.log10_e_pooled)):
                if not value < sampling.log10_e_limit:  # NaN fails, too
                    what = f"log10 E = {value:.4g} over {name}, the limit is {sampling.log10_e_limit:.4g}"
                    yield Failure("sampling", f"{where}: {what}", reproduce)
            for test in group.g_tests:
                if not test.p_value > sampling.p_limit:
                    what = f"p = {test.p_value:.3g} after output {test.context}, the limit is {sampling.p_limit:.3g}"
                    yield Failure("sampling", f"{where}: {what}", reproduce | {"prompt": plan.prompts[test.prompt]})


def _reproduce(plan: Plan, rule: str, combination: int | None) -> dict[str, Any]:
    """How sample i is drawn: see `Plan`."""
    o, step = plan.options, len(plan.combinations)
    first = plan.seed(rule, 0)
    seeds = {"first_seed": first, "last_seed": first + o.samples - 1}
    if combination is not None:
        seeds["first_seed"], seeds["seed_step"] = first + combination, step
        seeds["params"] = plan.combinations[combination].described()  # type: ignore[assignment]
    return {"rule": rule, "num_speculative_tokens": o.num_speculative_tokens, **seeds}


# --- Parts B and C: equality with plain decoding -----------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A request without speculation, whose output plain decoding alone decides."""

    name: str
    prompt: list[int]
    params: SamplingParams


def greedy_cases(plan: Plan) -> list[Case]:
    """Every prompt, plainly and with everything that changes the argmax."""
    length = plan.options.comparison_tokens
    chosen = [
        c for c in plan.combinations if c.params.penalises or c.params.biases or c.params.bad_words or c.name == "plain"
    ]
    return [
        Case(c.name, prompt, _lengthened(replace(c.params, temperature=0.0), length))
        for prompt in plan.comparison_prompts
        for c in chosen
    ]


def coupled_cases(plan: Plan) -> list[Case]:
    length, prompts = plan.options.comparison_tokens, plan.comparison_prompts
    return [
        Case(c.name, prompts[(i + s) % len(prompts)],
             replace(_lengthened(c.params, length), seed=plan.options.seed + 1000 * i + s))
        for i, c in enumerate(plan.combinations) for s in range(plan.options.comparison_seeds)
    ]  # fmt: skip


def _lengthened(params: SamplingParams, length: int) -> SamplingParams:
    return replace(params, max_tokens=length, min_tokens=length // 2 if params.min_tokens else 0)


def compare(
    plan: Plan, part: str, cases: list[Case], speculations: list[SpeculationParams], progress: Progress
) -> tuple[Comparison, list[Failure]]:
    """Every case with every speculation, in shuffled batches of every size, against plain decoding alone."""
    engine, generator = plan.engine, random.Random(plan.options.seed)
    off = replace(speculations[0], num_speculative_tokens=0)
    plain = [engine.generate([c.prompt], replace(c.params, speculation=off))[0].token_ids for c in cases]
    jobs = [(case, speculation) for case in range(len(cases)) for speculation in speculations]
    done, differences, tokens, drafts, accepted = 0, [], 0, 0, 0
    for size in BATCH_SIZES:
        generator.shuffle(jobs)
        for start in range(0, len(jobs), size):
            progress(f"{part} comparison", done, len(BATCH_SIZES) * len(jobs))
            batch = jobs[start : start + size]
            params = [replace(cases[case].params, speculation=speculation) for case, speculation in batch]
            outputs = engine.generate([cases[case].prompt for case, _ in batch], params)
            done += len(batch)
            tokens += sum(len(output.token_ids) for output in outputs)
            drafts += sum(output.stats.num_drafts for output in outputs)
            accepted += sum(output.stats.num_accepted_tokens for output in outputs)
            for (case, speculation), output in zip(batch, outputs):
                if output.token_ids != plain[case]:
                    differences.append(_difference(plan, cases[case], speculation, size, plain[case], output))
    tie = 0.0 if engine.runtime.model.target.kernels.name != "reference" else TIE
    unexplained = [d for d in differences if d.margin is None or d.margin > tie or tie == 0]
    comparison = Comparison(
        cases=len(cases),
        outputs=done,
        tokens=tokens,
        draft_lengths=tuple(sorted({s.num_speculative_tokens for s in speculations})),
        batch_sizes=BATCH_SIZES,
        mean_acceptance_length=1 + accepted / drafts if drafts else None,
        tie=tie,
        different=len(differences),
        unexplained=len(unexplained),
        largest_margin=max((d.margin for d in differences if d.margin is not None), default=0.0),
        examples=(unexplained + [d for d in differences if d not in unexplained])[:MAX_EXAMPLES],
    )
    return comparison, [_failure(part, d, tie) for d in unexplained[:MAX_EXAMPLES]]


def _failure(part: str, d: Difference, tie: float) -> Failure:
    why = "nothing explains it" if d.margin is None else f"the margin is {d.margin:.3g}, {tie:g} would be rounding"
    message = f"{d.case}: token {d.token} instead of {d.plain_token} at output position {d.position}; {why}"
    return Failure(part, message, asdict(d))


def _difference(
    plan: Plan, case: Case, speculation: SpeculationParams, size: int, plain: list[int], output: GenerationOutput
) -> Difference:
    ours, params = output.token_ids, case.params
    same = next((i for i, (a, b) in enumerate(zip(plain, ours)) if a != b), min(len(plain), len(ours)))
    a, b = (tokens[same] if same < len(tokens) else -1 for tokens in (plain, ours))
    margin = None if -1 in (a, b) else margin_of(plan.engine, case.prompt, plain[:same], params, a, b)
    return Difference(
        case.name, case.prompt, params.seed, asdict(speculation), size, position=same, plain_token=a, token=b,
        margin=margin,
    )  # fmt: skip


def margin_of(
    engine: Engine, prompt: list[int], output: list[int], params: SamplingParams, a: int, b: int
) -> float | None:
    """How far the scores of tokens a and b lie apart after prompt and output, in units of the largest logit: logits at
    temperature 0, else log-probabilities with the noise of coupled verification. None: one of them is impossible."""
    logits = PlainTarget(engine, len(prompt) + len(output)).logits_after(prompt + output)
    z = edited_logits(logits, prompt, torch.tensor([output], dtype=torch.int64), params)
    scores, scale = z[0], logits.abs().max() / (params.temperature or 1.0)
    if not params.greedy:
        p, rounded = truncated_probs(z, params)
        if not rounded:
            scores = scores.masked_fill(p[0] == 0, -math.inf)
        at = len(prompt) + len(output)
        noise = gumbel_noise([params.seed or 0], [Stream.TARGET], [at], [0], z.shape[1])
        scores = scores + torch.from_numpy(noise[0])
    if not scores[[a, b]].isfinite().all():
        return None
    return float((scores[a] - scores[b]).abs() / scale)


# --- All of it ---------------------------------------------------------------------------------------------------


def certify(options: LosslessOptions, progress: Progress = lambda *_: None) -> Certificate:
    """Runs all parts. Raises CheckpointError for a checkpoint that cannot be certified, ValueError for options that do
    not fit it."""
    start = time.perf_counter()
    plan = make_plan(options)
    sampling, failures = certify_sampling(plan, progress)
    greedy_speculations = [SpeculationParams(k) for k in DRAFT_LENGTHS] + [
        SpeculationParams(3, min_draft_confidence=0.5)
    ]
    greedy, found = compare(plan, "greedy", greedy_cases(plan), greedy_speculations, progress)
    failures += found
    coupled = None
    if "coupled" in options.rules:
        speculations = [
            SpeculationParams(k, "coupled", cast(DraftSampling, drafts))
            for k in DRAFT_LENGTHS for drafts in get_args(DraftSampling)
        ]  # fmt: skip
        coupled, found = compare(plan, "coupled", coupled_cases(plan), speculations, progress)
        failures += found
    return Certificate(
        options=options,
        provenance=_provenance(plan.engine),
        combinations={c.name: c.described() for c in plan.combinations},
        prompts=plan.prompts,
        sampling=sampling,
        greedy=greedy,
        coupled=coupled,
        failures=failures,
        seconds=time.perf_counter() - start,
    )


def make_plan(options: LosslessOptions) -> Plan:
    """Loads the engine, and finds prompts and parameters that suit it."""
    checkpoint = open_checkpoint(resolve_model(options.model))
    vocab_size, k = checkpoint.config.vocab_size, options.num_speculative_tokens
    if not checkpoint.index.has_mtp_layer:
        raise CheckpointError(
            f"{checkpoint.folder} has no MTP layer: it does not speculate, there is nothing to certify"
        )
    if vocab_size < MIN_VOCAB_SIZE:
        raise CheckpointError(f"{checkpoint.folder}: vocab_size = {vocab_size} must be at least {MIN_VOCAB_SIZE}")
    longest = max(options.comparison_tokens, (NUM_ITERATIONS + 1) * (k + 1) + 1)
    max_num_seqs = options.max_num_seqs or max(16, min(256, 2**25 // (vocab_size * (k + 1))))
    engine = Engine.from_pretrained(
        checkpoint.folder, kernels=options.kernels, dtype=options.dtype, num_threads=options.num_threads,
        max_num_seqs=max_num_seqs, max_model_len=PROMPT_TOKENS + longest,
    )  # fmt: skip
    activations = engine.runtime.model.target.kernels.activation_dtype
    if activations not in (torch.float32, torch.float64):
        raise ValueError(
            f"dtype = {options.dtype!r} computes in {activations}, in which a law depends on the batch by about 1e-2: "
            "there is no exact law to compare with; choose dtype = 'float32'"
        )
    prompts = _prompts(engine, max(options.num_prompts, options.comparison_prompts), options.seed)
    logits = PlainTarget(engine, PROMPT_TOKENS).logits_after(prompts[0])
    probable = logits[0].topk(6).indices.tolist()
    chosen = combinations(vocab_size, probable, options)
    return Plan(options, engine, prompts[: options.num_prompts], prompts[: options.comparison_prompts], chosen)


def _prompts(engine: Engine, count: int, seed: int) -> list[list[int]]:
    """Starts of the `stdlib` texts; random tokens where the tokenizer does not know text."""
    texts = [p.prompt for p in load_stdlib()]
    try:
        found = [engine.checkpoint.encode(texts[(seed + i) % len(texts)])[:PROMPT_TOKENS] for i in range(count)]
    except CheckpointError:
        found = []
    if found and min(map(len, found)) == PROMPT_TOKENS and len({tuple(prompt) for prompt in found}) == count:
        return found
    generator = random.Random(seed)
    vocab_size = engine.checkpoint.config.vocab_size
    return [[generator.randrange(vocab_size) for _ in range(RANDOM_PROMPT_TOKENS)] for _ in range(count)]


def _provenance(engine: Engine) -> dict[str, Any]:
    kernels = engine.runtime.model.target.kernels
    return {
        "model": str(engine.checkpoint.folder),
        "vocab_size": engine.checkpoint.config.vocab_size,
        "kernels": kernels.name,
        "dtype": str(getattr(kernels, "weight_dtype", kernels.dtype)).removeprefix("torch."),
        "activation_dtype": str(kernels.activation_dtype).removeprefix("torch."),
        "kv_dtype": str(engine.runtime.kv_cache.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "max_num_seqs": engine.config.max_num_seqs,
        "specdec": version("specdec"),
        "torch": version("torch"),
    }


# --- A small checkpoint ------------------------------------------------------------------------------------------

SMALL_HIDDEN, SMALL_NOISE, SMALL_SHARPNESS = 32, 1.5, 0.07


def write_small_checkpoint(folder: Path, seed: int = 0, vocab_size: int = MIN_VOCAB_SIZE) -> None:
    """A model of so few tokens that contexts come again and again, with every part of the architecture.

    Its layers write little to the residual stream, its head maps each token's embedding to that of another one, with
    laws flat enough to visit everything, and the MTP layer's projection is so noisy that drafts are accepted now and
    then. `folder` must be new.
    """
    config = _small_config(vocab_size)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(BPE(vocab={f"<{i}>": i for i in range(vocab_size)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}\n", encoding="utf-8")
    tensors = _small_tensors(parse_config(config), torch.Generator().manual_seed(seed))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _small_config(vocab_size: int) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "glm4_moe",
        "vocab_size": vocab_size,
        "hidden_size": SMALL_HIDDEN,
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "attention_bias": True,
        "use_qk_norm": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": [0],
        "pad_token_id": 0,
    }


def _small_tensors(config: Glm4MoeConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """By the checkpoint's names."""
    model = build_model(config, select(torch.device("meta"), torch.float32, "reference"), with_mtp=True)
    assert model.mtp is not None
    slots = dict(iter_slots(model.target)) | dict(iter_slots(model.mtp, mtp_prefix(config)))
    tensors = {}
    for name, slot in slots.items():
        noise = torch.randn(slot.shape, generator=generator)
        if "norm" in name:
            tensors[name] = 1 + 0.1 * noise
        elif name.endswith("bias"):
            tensors[name] = 0.1 * noise
        else:
            written = name.endswith(("o_proj.weight", "down_proj.weight"))
            tensors[name] = (0.1 if written else 1.0) * noise * slot.shape[-1] ** -0.5
    embed = torch.randn(config.vocab_size, SMALL_HIDDEN, generator=generator)
    tensors["model.embed_tokens.weight"] = embed
    tensors["lm_head.weight"] = SMALL_SHARPNESS * embed[torch.randperm(config.vocab_size, generator=generator)]
    errors = torch.randn(SMALL_HIDDEN, 2 * SMALL_HIDDEN, generator=generator) * SMALL_HIDDEN**-0.5
    identity = torch.cat([torch.eye(SMALL_HIDDEN), torch.zeros(SMALL_HIDDEN, SMALL_HIDDEN)], 1)
    tensors[f"{mtp_prefix(config)}eh_proj.weight"] = identity + SMALL_NOISE * errors
    return tensors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=Path, required=True, metavar="FOLDER", help="write the small checkpoint here")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        write_small_checkpoint(args.small, args.seed)
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
