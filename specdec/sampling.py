"""Which law a request's rows follow and which noise decides them: one description for target rows and draft rows.

The kernels do the work on whole rows (`specdec.kernels.interface.RowSampling`); `specdec.edits` does it on single
logits before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from specdec.kernels.interface import GREEDY, RowSampling
from specdec.rng import Stream
from specdec.sequence import Sequence


class SampledRows(NamedTuple):
    """Rows of a sequence, the first of which decides the token at `position`."""

    sequence: Sequence
    stream: int
    position: int
    num_rows: int = 1


def row_sampling(spans: Iterable[SampledRows]) -> RowSampling:
    rows = RowSampling([], [], [], [], [], [], [], [])
    for sequence, stream, position, num_rows in spans:
        p = sequence.params
        greedy = p.temperature == 0
        rows.scales.extend([1.0 if greedy else 1 / p.temperature] * num_rows)
        rows.top_k.extend([0 if greedy else p.top_k] * num_rows)
        rows.top_p.extend([1.0 if greedy else p.top_p] * num_rows)
        rows.min_p.extend([0.0 if greedy else p.min_p] * num_rows)
        rows.seeds.extend([sequence.seed] * num_rows)
        rows.streams.extend([stream] * num_rows)
        rows.positions.extend(range(position, position + num_rows))
        rows.starts.extend([len(sequence.token_ids) if stream == Stream.DRAFT else 0] * num_rows)
    return rows


def target_stream(sequence: Sequence) -> int:
    """The noise of the target's own tokens, for the rules that compare drafts with them."""
    return GREEDY if sequence.params.greedy else Stream.TARGET


def draft_stream(sequence: Sequence) -> int:
    if not sequence.samples_drafts:
        return GREEDY
    return Stream.TARGET if sequence.rule == "coupled" else Stream.DRAFT
