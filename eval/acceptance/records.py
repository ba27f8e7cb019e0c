"""What one request showed: counts of every verification, and the exact laws behind those that were analysed.

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
    """Model laws at the request's own verifications, n of them, the drafts it made there; NaN beyond a draft's end.

    indices [n]: which of the request's verifications. expected [n, K]: the probability, given the context, the drafts
    before and their acceptance, that draft i is accepted: exact, the draft itself and the rule's noise averaged out.
    confidence [n, K]: the largest probability of draft i's law; NaN of a user's own drafter, which says none.
    entropy [n, K]: of the target's law there, in nats. alpha [n, K]: sum of min(p, q). num_other_drafts: drafts that
    differ from those of the engine, 0 with row-invariant kernels.
    """

    indices: Ints
    expected: Floats
    confidence: Floats
    entropy: Floats
    alpha: Floats
    num_other_drafts: int


@dataclass(frozen=True, eq=False)
class RequestRecord:
    """One completion under one cell's settings.

    starts, num_drafted, num_accepted [n]: the request's n verifications with at least one draft: tokens before it
    (prompt included), drafts verified, drafts accepted. num_target_forwards counts those without drafts too.
    num_loop_tokens: output tokens in the output's final loop (`specdec.eval.acceptance.loops`). decode_s,
    num_decode_tokens: time and tokens after the first commit. analysis: of some of the requests.
    """

    prompt: int  # index in the prompt set
    category: str
    turn: int
    repeat: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_loop_tokens: int
    num_target_forwards: int
    starts: Ints
    num_drafted: Ints
    num_accepted: Ints
    ttft_s: float
    decode_s: float
    num_decode_tokens: int
    analysis: Analysis | None = None
