"""Turns records into arrays: all verifications of a cell, sums by request or cluster, the drafts that were analysed.

R requests, V verifications, K drafts per verification, n of whatever is summed by.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specdec.eval.acceptance.records import Floats, Ints, RequestRecord

Bools = NDArray[np.bool_]


def sum_by(labels: Ints, values: Floats | Bools, n: int) -> Floats:
    """Returns sums [n, columns] of the rows of values [m, columns] with the same label. labels: [m], from 0 to n -
    1."""
    columns = values.shape[1]
    places = labels[:, None] * columns + np.arange(columns)
    return np.bincount(places.ravel(), values.ravel(), n * columns).reshape(n, columns).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Verifications:
    """The V verifications of all requests."""

    request: Ints
    """[V]: index of the request's record."""
    output_position: Ints
    """[V]: output tokens before the verification."""
    num_drafted: Ints
    """[V]: drafts verified."""
    num_accepted: Ints
    """[V]: drafts accepted."""

    @classmethod
    def of(cls, records: Seq[RequestRecord]) -> Verifications:
        """Returns the verifications of these records, in their order."""
        return cls(
            np.repeat(np.arange(len(records)), [len(r.starts) for r in records]),
            np.concatenate([r.starts - r.num_prompt_tokens for r in records]),
            np.concatenate([r.num_drafted for r in records]),
            np.concatenate([r.num_accepted for r in records]),
        )


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums by request, or by cluster of requests: n rows."""

    drafted: Floats
    """[n, K]: verifications that drafted token i."""
    reached: Floats
    """[n, K]: those of them that accepted all drafts before it."""
    accepted: Floats
    """[n, K]: those of them that accepted it as well."""
    requests: Floats
    """[n, 1]: requests."""
    verifications: Floats
    """[n, 1]: verifications of at least one draft."""
    decode_tokens: Floats
    """[n, 1]: tokens after the first commit."""
    decode_forwards: Floats
    """[n, 1]: target forwards after the first commit."""
    rates: Floats
    """[n, 1]: tokens per second after the first commit, added up over the `timed` requests."""
    timed: Floats
    """[n, 1]: requests that decoded at all."""
    ttft_s: Floats
    """[n, 1]: seconds to the first token."""
    loop_tokens: Floats
    """[n, 1]: output tokens in final loops."""
    output_tokens: Floats
    """[n, 1]: output tokens."""
    plain_s: Floats
    """[n, 1]: seconds of plain decoding after the first commit, of requests that it completed too."""
    plain_tokens: Floats
    """[n, 1]: tokens of plain decoding after the first commit, of these requests."""
    paired_s: Floats
    """[n, 1]: seconds of the cell after the first commit, of these requests."""
    paired_tokens: Floats
    """[n, 1]: tokens of the cell after the first commit, of these requests."""

    @classmethod
    def of(cls, records: Seq[RequestRecord], plain: Seq[RequestRecord], num_drafts: int) -> Sums:
        """Returns sums by request.

        records: the cell's.
        plain: those of plain decoding.
        num_drafts: K.
        """
        verifications, position = Verifications.of(records), np.arange(num_drafts)
        drafted = position < verifications.num_drafted[:, None]  # [V, K]
        reached = drafted & (position <= verifications.num_accepted[:, None])
        accepted = position < verifications.num_accepted[:, None]
        by_request = (sum_by(verifications.request, x, len(records)) for x in (drafted, reached, accepted))
        others = {(r.prompt, r.turn, r.repeat): r for r in plain}
        rows = [_figures(r, others.get((r.prompt, r.turn, r.repeat))) for r in records]
        return cls(*by_request, *np.array(rows, np.float64).T[:, :, None])

    def only(self, chosen: Bools) -> Sums:
        """Returns the sums of the selected rows. chosen: [n]."""
        return Sums(*(x[chosen] for x in vars(self).values()))

    def by(self, labels: Ints) -> Sums:
        """Returns the sums by cluster. labels: [n], the cluster of each row, from 0 on."""
        n = int(labels.max()) + 1
        return Sums(*(sum_by(labels, x, n) for x in vars(self).values()))


def _figures(record: RequestRecord, plain: RequestRecord | None) -> tuple[float, ...]:
    """Returns the fields of `Sums` from `requests` on. plain: the same request by plain decoding, if it completed
    it."""
    rate = record.num_decode_tokens / record.decode_s if record.decode_s > 0 else 0.0
    pair = (0.0,) * 4
    if plain is not None:
        pair = (plain.decode_s, plain.num_decode_tokens, record.decode_s, record.num_decode_tokens)
    return (
        1.0, len(record.starts), record.num_decode_tokens, record.num_target_forwards - 1, rate, record.decode_s > 0,
        record.ttft_s, record.num_loop_tokens, record.num_output_tokens, *pair,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Drafts:
    """n drafts of analysed verifications whose predecessors were all accepted."""

    cluster: Ints
    """[n]: cluster of the request."""
    position: Ints
    """[n]: position of the draft, from 0."""
    accepted: Bools
    """[n]: whether it was accepted."""
    expected: Floats
    """[n]: see `Analysis`; freed of rounding beyond 0 and 1."""
    confidence: Floats
    """[n]: see `Analysis`; NaN without an MTP layer."""
    entropy: Floats
    """[n]: see `Analysis`."""
    alpha: Floats
    """[n]: see `Analysis`."""

    @classmethod
    def of(cls, records: Seq[RequestRecord], cluster: Ints, num_drafts: int) -> Drafts:
        """Returns the drafts of these records. cluster: [R], that of each record. num_drafts: K."""
        analysed = [(r, r.analysis, c) for r, c in zip(records, cluster.tolist()) if r.analysis is not None]
        none = np.zeros((0, num_drafts))
        accepted, drafted = (
            np.concatenate([np.zeros(0, np.int64), *counts])[:, None]
            for counts in (
                [r.num_accepted[a.indices] for r, a, _ in analysed],
                [r.num_drafted[a.indices] for r, a, _ in analysed],
            )
        )
        position = np.broadcast_to(np.arange(num_drafts), (len(accepted), num_drafts))
        reached = (position < drafted) & (position <= accepted)
        clusters = np.repeat([c for *_, c in analysed], [len(a.indices) for _, a, _ in analysed]).astype(np.int64)
        expected, *others = (
            np.concatenate([none, *(getattr(a, name) for _, a, _ in analysed)])[reached]
            for name in ("expected", "confidence", "entropy", "alpha")
        )
        cluster_of = np.broadcast_to(clusters[:, None], reached.shape)[reached]
        return cls(cluster_of, position[reached], (position < accepted)[reached], expected.clip(0, 1), *others)
