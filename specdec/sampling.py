"""Which law a request's rows follow and which noise decides them: one description for target rows and draft rows.

The kernels do the work on whole rows (`specdec.kernels.interface.RowSampling`); `specdec.edits` does it on single
logits before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from specdec.kernels.interface import GREEDY, RowSampling
from specdec.rng import Stream
from specdec.sequence import Rule, Sequence


class SampledRows(NamedTuple):
    """Rows of a sequence, the first of which decides the token at `position`."""

    sequence: Sequence
    stream: int
    position: int
    num_rows: int = 1


def row_sampling(spans: Iterable[SampledRows]) -> RowSampling:
    scales: list[float] = []
    top_k: list[int] = []
    top_p: list[float] = []
    min_p: list[float] = []
    seeds: list[int] = []
    streams: list[int] = []
    positions: list[int] = []
    starts: list[int] = []
    for sequence, stream, position, num_rows in spans:
        scale, k, p, m = sequence.params.row_law
        scales += [scale] * num_rows
        top_k += [k] * num_rows
        top_p += [p] * num_rows
        min_p += [m] * num_rows
        seeds += [sequence.seed] * num_rows
        streams += [stream] * num_rows
        positions += range(position, position + num_rows)
        starts += [len(sequence.token_ids) if stream == Stream.DRAFT else 0] * num_rows
    return RowSampling(scales, top_k, top_p, min_p, seeds, streams, positions, starts)


def target_stream(rule: Rule) -> int:
    """The noise of the target's own tokens, for the rules that compare drafts with them."""
    return GREEDY if rule == "greedy" else Stream.TARGET


def draft_stream(sequence: Sequence) -> int:
    if not sequence.samples_drafts:
        return GREEDY
    return Stream.TARGET if sequence.rule == "coupled" else Stream.DRAFT
