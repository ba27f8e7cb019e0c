"""Describes which distribution a request's rows follow and which noise decides them, for target rows and draft rows
alike. The kernels do the work (`specdec.kernels.decisions.RowSampling`).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from specdec.kernels.decisions import GREEDY, RowSampling
from specdec.request.seeds import Stream
from specdec.request.sequence import Rule, Sequence


def row_sampling(sequences: Seq[Sequence], streams: list[int]) -> RowSampling:
    """Describes, for each sequence, how the row that decides its next token is sampled. streams[i]: where sequence i's
    noise comes from, a `Stream` or GREEDY."""
    laws = [s.params.row_law for s in sequences]
    positions = [len(s.token_ids) for s in sequences]
    return RowSampling(
        scales=[law[0] for law in laws],
        top_k=[law[1] for law in laws],
        top_p=[law[2] for law in laws],
        min_p=[law[3] for law in laws],
        seeds=[s.seed for s in sequences],
        streams=streams,
        positions=positions,
        starts=[start if stream == Stream.DRAFT else 0 for start, stream in zip(positions, streams)],
    )


def target_stream(rule: Rule) -> int:
    """Returns the noise of the target's own tokens, for the rules that compare drafts with them."""
    return GREEDY if rule == "greedy" else Stream.TARGET


def draft_stream(sequence: Sequence) -> int:
    """Returns the noise of a sequence's drafts: under coupled verification the target's own."""
    if not sequence.samples_drafts:
        return GREEDY
    return Stream.TARGET if sequence.rule == "coupled" else Stream.DRAFT
