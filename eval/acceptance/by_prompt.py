"""A cell's counts by prompt, which let two runs over the same prompts be compared prompt by prompt."""

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
    """Sums over the requests (turns, repeats) of each of n prompts; K drafts per verification."""

    prompts: list[int]
    """[n]: indices in the prompt set, ascending."""
    reached: list[list[int]]
    """[n][K]: verifications that drafted token i and accepted all drafts before it. Every one reaches draft 1."""
    accepted: list[list[int]]
    """[n][K]: those of them that accepted draft i."""
    plain_decode_s: list[float]
    """[n]: seconds of plain decoding after the first commit, of requests that both it and the cell completed."""
    plain_decode_tokens: list[int]
    """[n]: tokens of plain decoding after the first commit, of these requests."""
    decode_s: list[float]
    """[n]: seconds of the cell after the first commit, of these requests."""
    decode_tokens: list[int]
    """[n]: tokens of the cell after the first commit, of these requests."""

    @classmethod
    def of(cls, prompts: Ints, sums: Sums) -> ByPrompt:
        """Returns the counts of a cell. prompts: [n], ascending. sums: n rows, one for each of them."""
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
    """Returns 1 + K figures over n prompts: accepted drafts per verification, then the conditional acceptance of drafts
    1 to K.

    counts: `by_prompt` of a cell in results.json, with drafts.
    """
    reached, accepted = (np.array(counts[name], np.float64) for name in ("reached", "accepted"))  # [n, K]
    x, most = (np.hstack([figures.sum(1, keepdims=True), figures]) for figures in (accepted, reached))
    return Quotients(np.stack([x, np.hstack([reached[:, :1], reached])]), most)


def speedup(counts: dict[str, Any]) -> Quotients:
    """Returns one figure over n prompts: seconds per token of plain decoding over those of the cell.

    counts: `by_prompt` of a cell in results.json.
    """
    names = ("plain_decode_s", "plain_decode_tokens", "decode_s", "decode_tokens")
    factors = np.array([counts[name] for name in names], np.float64)[:, :, None]
    return Quotients(factors, np.full_like(factors[0], np.inf))
