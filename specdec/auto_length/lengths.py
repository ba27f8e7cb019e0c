"""Finds the draft lengths with which one step is expected to give the most tokens per second. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate, count
from typing import NamedTuple

from specdec.config import MAX_SPECULATIVE_TOKENS
from specdec.cost import CostTable

MIN_SURVIVAL = 0.02  # drafts less likely to be accepted are not considered


class Candidate(NamedTuple):
    """A sequence that may draft."""

    survivals: Seq[float]
    """Probability, by position, that this draft and all before it are accepted; as many as it may draft."""
    catch_up_s: float = 0.0
    """Seconds that its waiting pairs add to the step if it drafts, beyond one pair for each token."""
    sampled: bool = False
    """Whether its temperature is above 0."""


@dataclass(frozen=True, slots=True)
class StepBase:
    """The step to which the candidates' drafts are added."""

    num_sequences: int
    """Sequences that take part, candidates included."""
    num_rows: int
    """Rows of the target's forward without the candidates' drafts."""
    others: Seq[int] = ()
    """Draft lengths of the sequences that sample but are no candidates."""
    between_s: float = 0.0
    """Seconds from the end of one step to the next one's drafts."""
    drafting_factor: float = 1.0
    """How much longer steps with drafts take than the table says, relative to plain ones."""


Draft = tuple[float, int, int]  # survival (negative, to be sorted by), depth, number of the candidate


def best_lengths(table: CostTable, base: StepBase, candidates: Seq[Candidate]) -> list[int]:
    """Returns the draft length of each candidate with which the step gives the most tokens per second.

    Drafts are admitted in descending order of survival, and of all prefixes of that order the best one is taken: the
    first draft of a step costs an extend of the MTP layer and later ones do not, so the rate has more than one maximum.

    table: the costs to predict by.
    base: the step without the candidates' drafts.
    candidates: the sequences that may draft.
    """
    # Survivals of a candidate fall with the position, so a prefix of this order holds its drafts from the first on.
    order = sorted(
        (-survival, depth, i)
        for i, candidate in enumerate(candidates)
        for depth, survival in enumerate(candidate.survivals)
        if survival >= MIN_SURVIVAL
    )
    rates = _rates(table, base, candidates, order)
    lengths = [0] * len(candidates)
    for _, _, i in order[: rates.index(max(rates))]:
        lengths[i] += 1
    return lengths


def _rates(table: CostTable, base: StepBase, candidates: Seq[Candidate], order: list[Draft]) -> list[float]:
    """Returns the tokens per second with none of the drafts in `order`, with the first, with the first two, and so on.

    The MTP layer's extend is taken at its mean: each drafting sequence has as many new pairs as it emits tokens.
    """
    drafting = [sum(k > depth for k in base.others) for depth in range(MAX_SPECULATIVE_TOKENS)]
    fixed_s = table.small_s(base.num_sequences, sum(c.sampled for c in candidates)) + table.chain_s(drafting)
    new_tokens = [-negative for negative, _, _ in order]
    new_pairs = [-negative if depth else 1 - negative for negative, depth, _ in order]
    totals = zip(
        accumulate(new_tokens, initial=float(len(candidates) + len(base.others))),
        accumulate(_draft_seconds(table, drafting, candidates, order), initial=fixed_s + base.between_s),
        accumulate(new_pairs, initial=float(sum(k > 0 for k in base.others))),
        count(base.num_rows),
    )
    target_s, extend_s = table.target_s, table.extend_s
    rates = [
        tokens / (seconds + target_s(num_rows) + extend_s(int(pairs + 0.5)))
        for tokens, seconds, pairs, num_rows in totals
    ]
    if not base.others:  # otherwise both sides of the comparison are steps with drafts
        rates[0] *= base.drafting_factor
    return rates


def _draft_seconds(
    table: CostTable, drafting: list[int], candidates: Seq[Candidate], order: list[Draft]
) -> Iterator[float]:
    """Yields what each draft adds to the step's seconds, beyond its row of the target and its pairs.

    drafting[d]: how many sequences draft more than d tokens; it is kept up to date.
    """
    for _, depth, i in order:
        candidate = candidates[i]
        seconds = table.step_s.increment(drafting[depth]) if depth else candidate.catch_up_s
        drafting[depth] += 1
        # its own row, and that of the target after it
        yield seconds + 2 * table.sampled_s if candidate.sampled else seconds
