"""What a step is expected to cost, and the draft lengths with which it is the fastest. No torch here."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from specdec.auto_length.acceptance import RequestAcceptance
from specdec.config import MAX_SPECULATIVE_TOKENS
from specdec.cost import CostTable

NO_DRAFTS = [0] * MAX_SPECULATIVE_TOKENS
MIN_SURVIVAL = 0.02  # drafts less likely to be accepted are not considered


@dataclass(slots=True)
class Request:
    """What a controller knows of one sequence. length: the draft length chosen last. probed_at: the step of its last
    probe; hot: that one was accepted. probe_length: drafts of the next one beyond those that pay."""

    acceptance: RequestAcceptance
    probed_at: int
    length: int | None = None
    hot: bool = False
    probe_length: int = 1


@dataclass(slots=True)
class StepPlan:
    """A step before it runs, for its cost by the table. members: the "auto" sequences that sample, as numbers b of
    scheduled ones; requests[i], lengths[i]: of the i-th of them. extra[b]: how many tokens more one of them drafts.
    flushed: those whose pairs need not wait longer. plain_s: seconds of the same step without drafts."""

    members: list[int]
    requests: list[Request]
    lengths: list[int]
    num_sequences: int
    num_rows: int
    num_pairs: int
    num_sampled: int
    drafting: list[int]  # [MAX_SPECULATIVE_TOKENS]: sequences with more than d drafts
    plain_s: float = 0.0
    extra: dict[int, int] = field(default_factory=dict)
    flushed: list[int] = field(default_factory=list)

    def add(self, num_drafts: int, num_pairs: int, sampled: bool, first: int = 0) -> None:
        """A sequence's drafts from `first` on, and the pairs before them."""
        self.num_rows += num_drafts
        self.num_pairs += num_pairs
        self.num_sampled += 2 * num_drafts * sampled
        for depth in range(first, first + num_drafts):
            self.drafting[depth] += 1

    def seconds(self, table: CostTable) -> float:
        return table.seconds(self.num_sequences, self.num_rows, self.num_pairs, self.drafting, self.num_sampled)


def best_lengths(
    table: CostTable,
    survivals: Seq[Seq[float]],
    num_sequences: int,
    num_rows: int,
    others: Seq[int] = (),
    catch_up_s: Seq[float] = (),
    sampled: Seq[bool] = (),
    drafting_factor: float = 1.0,
    between_s: float = 0.0,
) -> list[int]:
    """The draft lengths with the most tokens per second; survivals[i] has as many entries as sequence i may draft.

    (i, j) are admitted in descending order of survival, and of all prefixes of that order the best one is taken: the
    first draft of a step costs an extend and later ones do not, so the rate has more than one maximum.
    num_sequences, num_rows: of the step without these drafts. others: draft lengths of the step's other sequences.
    The extend is taken at its mean: each drafting sequence has as many new pairs as it emits tokens. catch_up_s: what
    drafting costs sequence i beyond that. sampled: sequences at a temperature above 0. drafting_factor: how
    much longer steps with drafts take than the table says, relative to plain ones. between_s: from a step to the next.
    """
    order = sorted(
        (-a, depth, i) for i, law in enumerate(survivals) for depth, a in enumerate(law) if a >= MIN_SURVIVAL
    )
    drafting = [sum(k > depth for k in others) for depth in range(MAX_SPECULATIVE_TOKENS)]
    pairs = float(sum(k > 0 for k in others))
    fixed_s = table.sequence_s * num_sequences + sum(table.step_s(n) for n in drafting[1:])
    fixed_s += table.sampled_s * sum(sampled) + between_s
    tokens = float(len(survivals) + len(others))
    plain_s = fixed_s + table.target_s(num_rows) + table.extend_s(int(pairs + 0.5))
    best_rate, best_count = tokens / plain_s * (1.0 if others else drafting_factor), 0
    sampled_draft_s = 2 * table.sampled_s  # its own row, and that of the target after it
    target_s, extend_s, step_s = table.target_s, table.extend_s, table.step_s
    for count, (a, depth, i) in enumerate(order, 1):
        if depth == 0:
            pairs += 1
            fixed_s += catch_up_s[i] if catch_up_s else 0.0
        if sampled and sampled[i]:
            fixed_s += sampled_draft_s
        if depth:
            fixed_s += step_s(drafting[depth] + 1) - step_s(drafting[depth])
        drafting[depth] += 1
        pairs -= a
        tokens -= a
        rate = tokens / (fixed_s + target_s(num_rows + count) + extend_s(int(pairs + 0.5)))
        if rate > best_rate:
            best_rate, best_count = rate, count
    lengths = [0] * len(survivals)
    for _, _, i in order[:best_count]:
        lengths[i] += 1
    return lengths
