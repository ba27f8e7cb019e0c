"""What a user may ask for: validated, frozen; a wrong value raises ValueError with the limit and the remedy."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

Verification = Literal["token"]
DraftSampling = Literal["sampled", "greedy"]
Recycling = Literal["post_norm", "pre_norm"]

MAX_SPECULATIVE_TOKENS = 8
MIN_TEMPERATURE = 1e-5  # below it fp32 logits overflow, and the result is greedy anyway
SEED_LIMIT = 2**64


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_int(name: str, value: Any, low: int, high: int | None = None, remedy: str = "") -> None:
    limits = f"at least {low}" if high is None else f"from {low} to {high}"
    inside = isinstance(value, Integral) and not isinstance(value, bool)
    inside = inside and value >= low and (high is None or value <= high)
    _require(inside, f"{name} = {value!r} must be an integer, {limits}{remedy}")


def _require_number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    inside = isinstance(value, Real) and not isinstance(value, bool)
    inside = inside and (low < value if open_low else low <= value) and value <= min(high, sys.float_info.max)
    opening = "(" if open_low else "["
    limits = f"in {opening}{low:g}, {high:g}]" if math.isfinite(high) else f"a finite number, at least {low:g}"
    _require(inside, f"{name} = {value!r} must be {limits}")


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    _require(
        isinstance(value, Iterable) and not isinstance(value, bytes), f"{name} = {value!r} must be a list or tuple"
    )
    return tuple(value)


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} = {value!r} is unknown: choose one of {', '.join(choices)}")


def _require_speculation(value: Any) -> None:
    _require(
        value is None or isinstance(value, SpeculationParams),
        f"speculation = {value!r} must be a SpeculationParams or None",
    )


@dataclass(frozen=True)
class SpeculationParams:
    """How the MTP head drafts and how drafts are verified; the engine's default, or one request's own.

    num_speculative_tokens: K, draft tokens per step; 0 switches speculation off (no MTP work at all).
    verification: "token", token rejection sampling (Leviathan et al. 2023; Chen et al. 2023).
        Temperature 0 is always verified greedily. Every rule keeps the target's distribution.
    draft_sampling: at temperature > 0, "sampled" draws drafts from the MTP distribution after the
        request's own transform; "greedy" takes its argmax and verifies it as a point mass.
    """

    num_speculative_tokens: int = 3
    verification: Verification = "token"
    draft_sampling: DraftSampling = "sampled"

    def __post_init__(self) -> None:
        _require_int(
            "num_speculative_tokens", self.num_speculative_tokens, 0, MAX_SPECULATIVE_TOKENS, "; 0 switches it off"
        )
        _require_choice("verification", self.verification, get_args(Verification))
        _require_choice("draft_sampling", self.draft_sampling, get_args(DraftSampling))


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    max_tokens: generate at most so many. temperature: 0 is greedy. top_k: 0 is off. top_p, min_p: as in
    transformers, applied in the order temperature, top-k, top-p, min-p.
    stop: the output's text ends before the first of these strings (after it with
    include_stop_str_in_output); they are sought in the output's text, which has no special tokens under
    skip_special_tokens. stop_token_ids: end after one of these, beside the checkpoint's own
    end-of-text ids, which ignore_eos switches off. seed: 0 <= seed < 2**64; None draws one and reports it.
    speculation: overrides the engine's for this request.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    speculation: SpeculationParams | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        _require_int("max_tokens", self.max_tokens, 1)
        _require_number("temperature", self.temperature, 0.0, math.inf)
        _require(
            self.temperature == 0 or self.temperature >= MIN_TEMPERATURE,
            f"temperature = {self.temperature!r} must be 0 (greedy) or at least {MIN_TEMPERATURE:g}",
        )
        _require_int("top_k", self.top_k, 0, remedy="; 0 switches it off")
        _require_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        for text in self.stop:
            _require(isinstance(text, str) and text != "", f"stop = {text!r} must be a non-empty string")
        for token in self.stop_token_ids:
            _require_int("stop_token_ids", token, 0)
        if self.seed is not None:
            _require_int("seed", self.seed, 0, SEED_LIMIT - 1)
        _require_speculation(self.speculation)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and defaults of an engine.

    speculation: for requests that bring none of their own; None means SpeculationParams() where the
        checkpoint has an MTP layer, plain decoding where it has none.
    max_num_seqs: requests in one step.
    max_num_batched_tokens: tokens of one target forward; longer prompts are prefilled in chunks (None: 2048,
        or what max_num_seqs needs).
    num_pages or kv_cache_bytes: the size of the KV cache, in pages of page_size tokens (neither: room
        for max_num_seqs requests of max_model_len, at most 2 GiB).
    max_model_len: prompt plus output, at most the checkpoint's positions (None).
    mtp_recycling: what draft steps after the first take in place of the target's hidden state;
        "pre_norm" is an ablation.
    """

    speculation: SpeculationParams | None = None
    max_num_seqs: int = 16
    max_num_batched_tokens: int | None = None
    num_pages: int | None = None
    kv_cache_bytes: int | None = None
    page_size: int = 16
    max_model_len: int | None = None
    mtp_recycling: Recycling = "post_norm"

    def __post_init__(self) -> None:
        _require_speculation(self.speculation)
        _require_int("max_num_seqs", self.max_num_seqs, 1)
        _require_int("page_size", self.page_size, 1)
        _require_int(
            "max_num_batched_tokens", self.token_budget, self._least_token_budget,
            remedy=f", so that every one of max_num_seqs = {self.max_num_seqs} requests can be verified in one step",
        )  # fmt: skip
        for name in ("num_pages", "kv_cache_bytes"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), 1)
        _require(
            self.num_pages is None or self.kv_cache_bytes is None,
            f"num_pages = {self.num_pages} and kv_cache_bytes = {self.kv_cache_bytes} both size the cache: give one",
        )
        if self.max_model_len is not None:
            _require_int("max_model_len", self.max_model_len, 2)
        _require_choice("mtp_recycling", self.mtp_recycling, get_args(Recycling))

    @property
    def token_budget(self) -> int:
        """max_num_batched_tokens, or its default."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(2048, self._least_token_budget)

    @property
    def _least_token_budget(self) -> int:
        return self.max_num_seqs * (MAX_SPECULATIVE_TOKENS + 1)
