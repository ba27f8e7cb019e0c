"""Records of what one request showed: counts of every verification, and exact figures of those that were analysed.

Everything a report says is computed from these records (`specdec.eval.acceptance.metrics`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Analysis:
    """What the model's distributions say at n of a request's own verifications, with the drafts that it made there.
    Values are NaN where a verification has fewer than K drafts."""

    indices: Ints
    """[n]: which of the request's verifications these are."""
    expected: Floats
    """[n, K]: the probability, given the context, the drafts before and their acceptance, that draft i is accepted:
    exact, the draft itself and the rule's noise averaged out."""
    confidence: Floats
    """[n, K]: the largest probability of draft i's distribution; NaN of a user's own drafter, which says none."""
    entropy: Floats
    """[n, K]: entropy of the target's distribution there, in nats."""
    alpha: Floats
    """[n, K]: sum of min(p, q)."""
    num_other_drafts: int
    """Drafts that differ from those of the engine; 0 with row-invariant kernels."""


@dataclass(frozen=True, eq=False)
class RequestRecord:
    """One completion under one cell's settings, with n verifications of at least one draft."""

    prompt: int
    """Index in the prompt set."""
    category: str
    """The prompt's category."""
    turn: int
    """Number of the conversation's turn, from 0."""
    repeat: int
    """Number of the repeat, from 0."""
    num_prompt_tokens: int
    """Tokens of the prompt, earlier turns and answers included."""
    num_output_tokens: int
    """Tokens generated."""
    num_loop_tokens: int
    """Output tokens in the output's final loop (`specdec.eval.acceptance.loops`)."""
    num_target_forwards: int
    """Target forwards that decided a token, those without drafts included."""
    starts: Ints
    """[n]: tokens before each verification, the prompt's included."""
    num_drafted: Ints
    """[n]: drafts verified."""
    num_accepted: Ints
    """[n]: drafts accepted."""
    ttft_s: float
    """Seconds to the first token."""
    decode_s: float
    """Seconds after the first commit."""
    num_decode_tokens: int
    """Tokens after the first commit."""
    analysis: Analysis | None = None
    """What the model's distributions say at the verifications; None where they were not looked at."""
