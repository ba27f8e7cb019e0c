"""Options of `specdec eval acceptance`, and the grid of cells that they span."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, get_args

from specdec import SpeculationParams
from specdec.config import (
    MAX_SPECULATIVE_TOKENS,
    MIN_TEMPERATURE,
    DraftMode,
    Recycling,
    VerificationRule,
    require_default_recycling,
)

MAX_BATCH_SIZE, MAX_TEMPERATURE, MAX_SEED = 256, 100.0, 2**32
LEAST_PROMPTS_PER_ROUND, BATCHES_PER_ROUND = 4, 2


@dataclass(frozen=True)
class Settings:
    """What both modes, generating and teacher-forced, are asked for."""

    model: str = "bundled"
    """The checkpoint, as `Engine.from_pretrained` takes it."""
    prompts: tuple[str, ...] = ("stdlib",)
    """Names of sets or JSONL files, see `specdec.eval.prompts`."""
    num_prompts: int | None = None
    """The most prompts, one of each category in turn; None: all."""
    num_speculative_tokens: tuple[int, ...] = (1, 2, 3, 5)
    """Draft lengths, K."""
    temperatures: tuple[float, ...] = (0.0, 0.6, 1.0)
    """Temperatures; 0 is greedy."""
    verification: tuple[VerificationRule, ...] = ("coupled", "block", "token")
    """Rules at temperature > 0."""
    draft_sampling: tuple[DraftMode, ...] = ("sampled",)
    """Ways of drafting at temperature > 0."""
    seed: int = 0
    """Seed of everything that is drawn."""
    kernels: str = "auto"
    """The backend, as `Engine.from_pretrained` takes it."""
    dtype: str = "auto"
    """Dtype of the matrices, as `Engine.from_pretrained` takes it."""
    num_threads: int | None = None
    """CPU threads; None leaves torch's own number."""
    mtp_recycling: Recycling = "post_norm"
    """What the MTP layer recycles; "pre_norm" is an ablation, see `specdec.config.EngineConfig`."""
    chat: bool = False
    """Whether the checkpoint's chat template is applied."""
    skip_bad: bool = False
    """Whether bad lines, and prompts too long for the context, are left out instead of refused."""

    def __post_init__(self) -> None:
        """Raises ValueError for settings that cannot be."""
        if not self.prompts:
            raise ValueError("prompts must name at least one set or file")
        if self.num_prompts is not None:
            check_number("num_prompts", self.num_prompts, 1, 2**20)
        check_number("seed", self.seed, 0, MAX_SEED - 1)
        remedy = "; plain decoding is measured in any case"
        _check_values("num_speculative_tokens", self.num_speculative_tokens, 1, MAX_SPECULATIVE_TOKENS, remedy)
        _check_list("temperatures", self.temperatures)
        for value in self.temperatures:
            if value != 0:
                check_number("temperatures", value, MIN_TEMPERATURE, MAX_TEMPERATURE, ", or 0 for greedy decoding")
        _check_choices("verification", self.verification, get_args(VerificationRule))
        _check_choices("draft_sampling", self.draft_sampling, get_args(DraftMode))
        _check_choices("mtp_recycling", (self.mtp_recycling,), get_args(Recycling))


@dataclass(frozen=True)
class AcceptanceOptions(Settings):
    """What to measure. Every temperature, batch size, rule, way of drafting and K is one cell, beside plain decoding of
    the same temperature and batch size; at temperature 0 rules and ways of drafting are all the same."""

    num_prompts: int | None = 36
    """The most prompts, one of each category in turn; None: all."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Requests at once."""
    max_tokens: int = 256
    """The most tokens of each output."""
    repeats: int = 1
    """Passes through everything, with other seeds."""
    check_contexts: int = 800
    """Verifications of each cell whose exact distributions are computed; 0: none, and no check."""
    drafter: str | None = None
    """WHERE:NAME of a drafter of the user's own, which drafts in the MTP layer's place
    (`specdec.eval.acceptance.own_drafter`); its drafts are point masses, so draft_sampling must be "greedy"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_without_mtp()
        _check_values("batch_sizes", self.batch_sizes, 1, MAX_BATCH_SIZE)
        for name, low, high in (
            ("max_tokens", 2, 2**20),
            ("repeats", 1, 1000),
            ("check_contexts", 0, 2**31),
        ):
            check_number(name, getattr(self, name), low, high)

    def _check_without_mtp(self) -> None:
        """Raises ValueError for what only the MTP layer's drafts can be."""
        if self.drafter is None:
            return
        if "sampled" in self.draft_sampling:
            raise ValueError(
                "draft_sampling = 'sampled' needs the MTP layer's distributions, and a drafter of your own, "
                f"{self.drafter!r}, has none: give 'greedy', which is how its drafts are verified"
            )
        require_default_recycling(self.mtp_recycling, self.drafter)

    def request_seed(self, prompt: int, turn: int, repeat: int) -> int:
        """Returns a request's seed, which is the same in every cell, so that cells are compared on the same noise."""
        return derived_seed(self.seed, prompt, turn, repeat)

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells by temperature and batch size; the plain cell of each comes first."""
        return [cell for t in self.temperatures for b in self.batch_sizes for cell in self._cells_of(t, b)]

    def _cells_of(self, temperature: float, batch_size: int) -> list[Cell]:
        rules = [("greedy", "greedy")] if temperature == 0 else [
            (rule, drafts) for rule in self.verification for drafts in self.draft_sampling
        ]  # fmt: skip
        plain = rules[0] if temperature == 0 else ("coupled", "sampled")
        return [Cell(temperature, batch_size, *plain, 0)] + [
            Cell(temperature, batch_size, *rule, k) for rule in rules for k in self.num_speculative_tokens
        ]


@dataclass(frozen=True)
class Cell:
    """One combination of settings."""

    temperature: float
    """The temperature."""
    batch_size: int
    """Requests at once."""
    verification: str
    """The rule; "greedy" at temperature 0."""
    draft_sampling: str
    """The way of drafting; "greedy" at temperature 0."""
    num_speculative_tokens: int
    """K; 0 is plain decoding, sampled as coupled verification does it: its tokens are then those of the coupled
    cells."""

    @property
    def name(self) -> str:
        """A name for files and messages, which no other cell has."""
        temperature = str(float(self.temperature)).removesuffix(".0")
        rule = f"{self.verification}-{self.draft_sampling}" if self.num_speculative_tokens else "plain"
        return f"t{temperature}-b{self.batch_size}-k{self.num_speculative_tokens}-{rule}"

    @property
    def plain(self) -> Cell:
        """The cell that this one's speed is compared with."""
        rule = ("greedy", "greedy") if self.temperature == 0 else ("coupled", "sampled")
        return Cell(self.temperature, self.batch_size, *rule, 0)

    @property
    def speculation(self) -> SpeculationParams:
        """The speculation of its requests."""
        if self.temperature == 0:
            return SpeculationParams(self.num_speculative_tokens)
        settings: Any = self.verification, self.draft_sampling
        return SpeculationParams(self.num_speculative_tokens, *settings)


def derived_seed(*parts: int) -> int:
    """Returns a seed of 64 bits that is derived from another one and from what it is for."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


def rounds(num_prompts: int, batch_size: int) -> list[range]:
    """Returns the prompts of each round, which a cell completes before the next cell's turn comes: a slow moment of the
    machine meets all cells, and batches stay full for most of a round."""
    wanted = max(LEAST_PROMPTS_PER_ROUND, BATCHES_PER_ROUND * batch_size)
    num_rounds = max(1, round(num_prompts / wanted))
    limits = [num_prompts * i // num_rounds for i in range(num_rounds + 1)]
    return [range(first, end) for first, end in pairwise(limits)]


def check_number(name: str, value: float, low: float, high: float, remedy: str = "") -> None:
    """Raises ValueError unless a value is from low to high. remedy: what the message ends with."""
    if not low <= value <= high:
        raise ValueError(f"{name} = {value} must be from {low:g} to {high:g}{remedy}")


def _check_values(name: str, values: tuple[int, ...], low: int, high: int, remedy: str = "") -> None:
    _check_list(name, values)
    for value in values:
        check_number(name, value, low, high, remedy)


def _check_list(name: str, values: tuple[Any, ...]) -> None:
    if not values or len(set(values)) < len(values):
        given = ",".join(map(str, values))
        raise ValueError(f"{name} = {given!r} must hold at least one value, and none twice")


def _check_choices(name: str, values: tuple[str, ...], choices: tuple[str, ...]) -> None:
    _check_list(name, values)
    for choice in values:
        if choice not in choices:
            raise ValueError(f"{name}: {choice!r} is unknown: choose among {', '.join(choices)}")
