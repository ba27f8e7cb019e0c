"""What to certify and what was found: options and results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from specdec.config import MAX_SPECULATIVE_TOKENS, MIN_TEMPERATURE, Verification

Ints = NDArray[np.int64]

RULES = get_args(Verification)
DRAFT_LENGTHS = tuple(range(MAX_SPECULATIVE_TOKENS + 1))  # of the comparisons with plain decoding
BATCH_SIZES = (1, 7, 32)
TEMPERATURES = (0.3, 0.7, 1.0, 1.5)
NUM_ITERATIONS = 3  # speculative ones, at least, of every sample
MIN_VOCAB_SIZE = 8
MAX_SAMPLES, MAX_SEED = 2**32, 2**20
MAX_EXAMPLES = 10
POWER = 0.99
TIE = 1e-3  # of the largest logit: kernels that are not row-invariant may choose either of two tokens this close


@dataclass(frozen=True)
class LosslessOptions:
    """What to certify. samples: engine outputs per rule. alpha: the probability that a lossless engine fails.

    num_speculative_tokens: K of the samples; the comparisons with plain decoding take `DRAFT_LENGTHS`.
    temperature: of the plain combination; the others' follow it. num_prompts: contexts that samples start from, few so
    that contexts come again; comparison_prompts: of the comparisons.
    max_num_seqs: requests in one step (None: 256, fewer with a large vocabulary).
    comparison_seeds: of each combination in the coupled comparison; comparison_tokens: of each output in both.
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
    comparison_seeds: int = 8
    comparison_tokens: int = 32

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
