"""Records as arrays: all verifications of a cell in one, sums by request or cluster, the drafts that were analysed.

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
    """labels [m] from 0 to n - 1, values [m, columns] -> sums of the rows with the same label, [n, columns]."""
    columns = values.shape[1]
    places = labels[:, None] * columns + np.arange(columns)
    return np.bincount(places.ravel(), values.ravel(), n * columns).reshape(n, columns).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Verifications:
    """Of all requests, [V]. request: index of the record. output_position: output tokens before it."""

    request: Ints
    output_position: Ints
    num_drafted: Ints
    num_accepted: Ints

    @classmethod
    def of(cls, records: Seq[RequestRecord]) -> Verifications:
        return cls(
            np.repeat(np.arange(len(records)), [len(r.starts) for r in records]),
            np.concatenate([r.starts - r.num_prompt_tokens for r in records]),
            np.concatenate([r.num_drafted for r in records]),
            np.concatenate([r.num_accepted for r in records]),
        )


@dataclass(frozen=True, eq=False)
class Sums:
    """By request or by cluster of them: n rows.

    drafted, reached, accepted [n, K]: verifications by draft position. All others [n, 1]: decode_*: after the first
    commit. rates: tokens per second of those `timed` requests that decoded at all. ttft_s. loop_tokens: of the
    output_tokens those in final loops. paired_*: seconds and tokens after the first commit of requests that plain
    decoding completed too, `plain_*` by plain decoding.
    """

    drafted: Floats
    reached: Floats
    accepted: Floats
    requests: Floats
    verifications: Floats
    decode_tokens: Floats
    decode_forwards: Floats
    rates: Floats
    timed: Floats
    ttft_s: Floats
    loop_tokens: Floats
    output_tokens: Floats
    plain_s: Floats
    plain_tokens: Floats
    paired_s: Floats
    paired_tokens: Floats

    @classmethod
    def of(cls, records: Seq[RequestRecord], plain: Seq[RequestRecord], num_drafts: int) -> Sums:
        """By request. num_drafts: K."""
        verifications, position = Verifications.of(records), np.arange(num_drafts)
        drafted = position < verifications.num_drafted[:, None]  # [V, K]
        reached = drafted & (position <= verifications.num_accepted[:, None])
        accepted = position < verifications.num_accepted[:, None]
        by_request = (sum_by(verifications.request, x, len(records)) for x in (drafted, reached, accepted))
        others = {(r.prompt, r.turn, r.repeat): r for r in plain}
        rows = [_figures(r, others.get((r.prompt, r.turn, r.repeat))) for r in records]
        return cls(*by_request, *np.array(rows, np.float64).T[:, :, None])

    def only(self, chosen: Bools) -> Sums:
        """Of some of the rows."""
        return Sums(*(x[chosen] for x in vars(self).values()))

    def by(self, labels: Ints) -> Sums:
        """Of clusters: labels [rows] from 0 on."""
        n = int(labels.max()) + 1
        return Sums(*(sum_by(labels, x, n) for x in vars(self).values()))


def _figures(record: RequestRecord, plain: RequestRecord | None) -> tuple[float, ...]:
    """The fields of `Sums` from `requests` on."""
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
    """Drafts of analysed verifications whose predecessors were all accepted, [n].

    position: from 0.
    expected: as in `Analysis`, freed of rounding beyond 0 and 1.
    confidence, entropy, alpha: as in `Analysis`; confidence may be NaN.
    """

    cluster: Ints
    position: Ints
    accepted: Bools
    expected: Floats
    confidence: Floats
    entropy: Floats
    alpha: Floats

    @classmethod
    def of(cls, records: Seq[RequestRecord], cluster: Ints, num_drafts: int) -> Drafts:
        """cluster [R]: of each record. num_drafts: K."""
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
