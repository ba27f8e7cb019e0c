"""A cell's counts by prompt: what lets two runs over the same prompts be compared prompt by prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from specdec.eval.acceptance.intervals import Quotients
from specdec.eval.acceptance.pooling import Sums
from specdec.eval.acceptance.records import Ints

DECIMALS = 7  # of seconds


@dataclass(frozen=True)
class ByPrompt:
    """Sums over the requests (turns, repeats) of each of n prompts; K drafts per verification.

    prompts: n indices in the prompt set, ascending.
    reached, accepted: [n][K], verifications whose drafts before draft i were all accepted and that drafted i; those of
        them that accepted it. Every verification reaches draft 1.
    plain_decode_s, plain_decode_tokens, decode_s, decode_tokens: [n], seconds and tokens after the first commit, of
        plain decoding and of the cell, over requests that both completed.
    """

    prompts: list[int]
    reached: list[list[int]]
    accepted: list[list[int]]
    plain_decode_s: list[float]
    plain_decode_tokens: list[int]
    decode_s: list[float]
    decode_tokens: list[int]

    @classmethod
    def of(cls, prompts: Ints, sums: Sums) -> ByPrompt:
        """prompts [n], sums [n rows]: of each prompt, in order."""
        return cls(
            prompts=prompts.tolist(),
            reached=sums.reached.astype(int).tolist(),
            accepted=sums.accepted.astype(int).tolist(),
            plain_decode_s=sums.plain_s[:, 0].round(DECIMALS).tolist(),
            plain_decode_tokens=sums.plain_tokens[:, 0].astype(int).tolist(),
            decode_s=sums.paired_s[:, 0].round(DECIMALS).tolist(),
            decode_tokens=sums.paired_tokens[:, 0].astype(int).tolist(),
        )


def acceptances(counts: dict[str, Any]) -> Quotients:
    """Accepted drafts per verification, then the conditional acceptance of drafts 1 to K, n prompts: 1 + K figures.

    counts: `by_prompt` of a cell in results.json, with drafts.
    """
    reached, accepted = (np.array(counts[name], np.float64) for name in ("reached", "accepted"))  # [n, K]
    x, most = (np.hstack([figures.sum(1, keepdims=True), figures]) for figures in (accepted, reached))
    return Quotients(np.stack([x, np.hstack([reached[:, :1], reached])]), most)


def speedup(counts: dict[str, Any]) -> Quotients:
    """Seconds per token of plain decoding over those of the cell: one figure.

    counts: `by_prompt` of a cell in results.json.
    """
    names = ("plain_decode_s", "plain_decode_tokens", "decode_s", "decode_tokens")
    factors = np.array([counts[name] for name in names], np.float64)[:, :, None]
    return Quotients(factors, np.full_like(factors[0], np.inf))
