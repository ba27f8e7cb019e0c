"""Which law a request's rows follow and which noise decides them: one description for target rows and draft rows.

The kernels do the work on whole rows (`specdec.kernels.interface.RowSampling`); `specdec.edits` does it on single
logits before.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from specdec.kernels.interface import GREEDY, RowSampling
from specdec.rng import Stream
from specdec.sequence import Sequence


def row_sampling(rows: Seq[tuple[Sequence, int, int]]) -> RowSampling:
    """(sequence, stream, position) of each row."""
    params = [sequence.params for sequence, _, _ in rows]
    return RowSampling(
        scales=[1.0 if p.greedy else 1 / p.temperature for p in params],
        top_k=[0 if p.greedy else p.top_k for p in params],
        top_p=[1.0 if p.greedy else p.top_p for p in params],
        min_p=[0.0 if p.greedy else p.min_p for p in params],
        seeds=[sequence.seed for sequence, _, _ in rows],
        streams=[stream for _, stream, _ in rows],
        positions=[position for _, _, position in rows],
        starts=[len(sequence.token_ids) if stream == Stream.DRAFT else 0 for sequence, stream, _ in rows],
    )


def target_stream(sequence: Sequence) -> int:
    """The noise of the target's own tokens, for the rules that compare drafts with them."""
    return GREEDY if sequence.params.greedy else Stream.TARGET


def draft_stream(sequence: Sequence) -> int:
    if not sequence.samples_drafts:
        return GREEDY
    return Stream.TARGET if sequence.rule == "coupled" else Stream.DRAFT
