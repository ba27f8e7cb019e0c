"""Options and results of a certificate: what to certify, and what was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from specdec.config import MAX_SPECULATIVE_TOKENS, MIN_TEMPERATURE, VerificationRule

Ints = NDArray[np.int64]

RULES = get_args(VerificationRule)
DRAFT_LENGTHS = tuple(range(MAX_SPECULATIVE_TOKENS + 1))  # K of the comparisons with plain decoding
BATCH_SIZES = (1, 7, 32)
TEMPERATURES = (0.3, 0.7, 1.0, 1.5)
NUM_ITERATIONS = 3  # speculative iterations that every sample has at least
MIN_VOCAB_SIZE = 8
MAX_SAMPLES, MAX_SEED = 2**32, 2**20
MAX_EXAMPLES = 10
POWER = 0.99
TIE = 1e-3  # largest logits: kernels that are not row-invariant may choose either of two tokens this close


@dataclass(frozen=True)
class LosslessOptions:
    """What to certify. Raises ValueError for what cannot be."""

    model: str = "bundled"
    """The checkpoint, as `Engine.from_pretrained` takes it."""
    kernels: str = "auto"
    """The backend, as `Engine.from_pretrained` takes it."""
    dtype: str = "auto"
    """Dtype of the matrices, as `Engine.from_pretrained` takes it."""
    num_threads: int | None = None
    """CPU threads; None leaves torch's own number."""
    samples: int = 5000
    """Sampled outputs per rule, over all parameter combinations."""
    alpha: float = 1e-6
    """The probability that a lossless engine fails."""
    rules: tuple[str, ...] = RULES
    """Verification rules to sample with."""
    num_speculative_tokens: int = 3
    """K of the samples; the comparisons with plain decoding take `DRAFT_LENGTHS`."""
    temperature: float = 1.0
    """Temperature of the plain combination; the others' follow it."""
    seed: int = 0
    """Seed of samples and prompts."""
    num_prompts: int = 2
    """Contexts that samples start from, few so that contexts come again."""
    comparison_prompts: int = 4
    """Prompts of the comparisons."""
    max_num_seqs: int | None = None
    """Requests in one step; None is 256, fewer with a large vocabulary."""
    comparison_seeds: int = 8
    """Seeds of each combination in the coupled comparison."""
    comparison_tokens: int = 32
    """Tokens of each output in the comparisons."""

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
    """Something that shows that the engine is not lossless."""

    part: str
    """The part that found it: "sampling", "greedy" or "coupled"."""
    message: str
    """What was found."""
    reproduce: dict[str, Any]
    """Prompt, parameters and seeds that reproduce it, as JSON."""


@dataclass(frozen=True)
class Detectable:
    """The smallest shift of a distribution, in total variation, that the same data would have shown with probability
    `POWER`."""

    from_top: float | None
    """Mass moved from the most probable token to the others; None where no such shift would have been shown."""
    to_top: float | None
    """Mass moved from the other tokens to the most probable one; None where no such shift would have been shown."""


@dataclass(frozen=True)
class GTest:
    """A G-test of the tokens after one context."""

    prompt: int
    """Number of the prompt."""
    context: list[int]
    """Output tokens after it."""
    visits: int
    """How often the context was visited."""
    num_cells: int
    """Cells after merging."""
    p_value: float
    """The test's p-value."""


@dataclass(frozen=True)
class GroupResult:
    """The tests of one rule with one parameter combination, or with all of them."""

    combination: str
    """The combination's name; "all" for all of them."""
    samples: int
    """Sampled outputs."""
    log10_e_contexts: float
    """log10 of the e-process over contexts; inf after an impossible token."""
    log10_e_pooled: float
    """log10 of the pooled e-process."""
    pooled_positions: int
    """Tokens that the pooled e-process has read."""
    pooled_shift: Detectable
    """What the pooled e-process would have found, averaged over positions."""
    g_tests: list[GTest]
    """G-tests; none for all combinations together."""

    @property
    def log10_e(self) -> float:
        """The larger of both e-processes."""
        return max(self.log10_e_contexts, self.log10_e_pooled)

    @property
    def smallest_p(self) -> float:
        """The smallest p-value of the G-tests; 1 without any."""
        return min((test.p_value for test in self.g_tests), default=1.0)


@dataclass(frozen=True)
class RuleResult:
    """What was found about one rule."""

    rule: str
    """The rule."""
    samples: int
    """Sampled outputs."""
    tokens: int
    """Their tokens."""
    iterations: int
    """Their verifications of drafts."""
    few_iterations: int
    """Samples with fewer than `NUM_ITERATIONS` verifications of drafts."""
    mean_acceptance_length: float | None
    """Tokens per verification; None without any."""
    contexts: int
    """Distinct pairs of a combination and a context."""
    repeated_contexts: int
    """Contexts among them that were visited more than once."""
    rounded_contexts: int
    """Contexts that were left out, since rounding decides their distribution."""
    impossible_tokens: int
    """Tokens that the distribution makes impossible."""
    context_visits: int
    """Visits of the context visited most."""
    context_shift: Detectable
    """What would have been found at that context."""
    groups: list[GroupResult]
    """The tests by combination."""
    together: GroupResult
    """The tests of all combinations together."""

    @property
    def worst(self) -> GroupResult:
        """The group with the largest e-process."""
        return max([*self.groups, self.together], key=lambda group: group.log10_e)

    @property
    def smallest_p(self) -> float:
        """The smallest p-value of all G-tests."""
        return min(group.smallest_p for group in self.groups)


@dataclass(frozen=True)
class Sampling:
    """What the sampling part found."""

    num_tests: int
    """Number of tests in all, M."""
    log10_e_limit: float
    """An e-process fails from this log10 E on."""
    p_limit: float
    """A G-test fails up to this p-value."""
    rules: list[RuleResult]
    """What was found about each rule."""


@dataclass(frozen=True)
class Difference:
    """An output that differs from plain decoding's."""

    case: str
    """The parameter combination's name."""
    prompt_token_ids: list[int]
    """The prompt."""
    seed: int | None
    """The request's seed."""
    speculation: dict[str, Any]
    """Its speculation parameters."""
    batch_size: int
    """Requests that ran with it, itself included."""
    position: int
    """Output position of the first token that differs."""
    plain_token: int
    """The token of plain decoding there; -1 after its end."""
    token: int
    """The token of the output there; -1 after its end."""
    margin: float | None
    """Distance of the two tokens' scores, in units of the largest logit; None where scores do not explain it."""


@dataclass(frozen=True)
class Comparison:
    """Outputs compared with plain decoding alone, token for token."""

    cases: int
    """Requests."""
    outputs: int
    """Outputs, one for each request and draft length."""
    tokens: int
    """Their tokens."""
    draft_lengths: tuple[int, ...]
    """Draft lengths that were compared."""
    batch_sizes: tuple[int, ...]
    """Batch sizes that were drawn from."""
    mean_acceptance_length: float | None
    """Tokens per verification; None without any."""
    tie: float
    """Margin up to which a difference is put down to rounding; 0 on row-invariant kernels."""
    different: int
    """Outputs that differ."""
    unexplained: int
    """Outputs among them that rounding does not explain."""
    largest_margin: float
    """The largest margin of a difference."""
    examples: list[Difference]
    """Some of the differences, unexplained ones first."""


@dataclass(frozen=True)
class Certificate:
    """What was certified, and what was found."""

    options: LosslessOptions
    """What was asked for."""
    provenance: dict[str, Any]
    """Model, kernels and versions."""
    combinations: dict[str, dict[str, Any]]
    """Parameters of each combination that are not defaults, by its name."""
    prompts: list[list[int]]
    """Prompts of the samples."""
    sampling: Sampling
    """Whether sampled outputs follow the target's distribution."""
    greedy: Comparison
    """Whether greedy outputs equal plain decoding's."""
    coupled: Comparison | None
    """Whether coupled outputs equal plain decoding's; None where that rule was not asked for."""
    failures: list[Failure]
    """All that shows that the engine is not lossless."""
    seconds: float
    """Seconds of the whole run."""

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures
