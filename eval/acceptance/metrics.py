"""Computes every figure of a cell in results.json, with its interval, from the cell's records.

K: drafts per verification. Position i counts for the unconditional acceptance A_i where a verification drafted i or
more, for the conditional one alpha_i where moreover the i - 1 drafts before were accepted. Clusters of all intervals
are prompts, with their turns and repeats (`specdec.eval.acceptance.intervals`); of a cell's total speed, repeats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from specdec.eval.acceptance.by_prompt import ByPrompt
from specdec.eval.acceptance.intervals import NO_ESTIMATE, Estimate, calibration_error, paired_ratios, ratios
from specdec.eval.acceptance.plan import Cell
from specdec.eval.acceptance.pooling import Bools, Drafts, Sums, Verifications, sum_by
from specdec.eval.acceptance.records import Analysis, Floats, Ints, RequestRecord

ENTROPY_EDGES = np.array([0, 0.1, 0.25, 0.5, 1, 2, 3, 4, math.inf])  # nats
PROBABILITY_EDGES = np.arange(11) / 10
FIRST_POSITION_EDGES = (1, 8)  # output tokens; then doubling
MAX_Z = 4.0
MAX_LOOP_SHARE = 0.2  # share of the output tokens in final loops that is warned of


@dataclass(frozen=True)
class Group:
    """Figures of all requests of a cell, or of those of one category."""

    num_requests: int
    """Requests."""
    num_verifications: int
    """Verifications of at least one draft."""
    conditional: list[Estimate]
    """[K]: acceptance of draft i, where the drafts before were accepted."""
    unconditional: list[Estimate]
    """[K]: acceptance of draft i and of all before it."""
    mean_acceptance_length: Estimate
    """1 + accepted / verifications, the recovered or bonus token included."""
    draft_efficiency: Estimate
    """Accepted over drafted."""
    block_efficiency: Estimate
    """Output tokens after the first commit per target forward that decided them."""
    tokens_per_s_per_request: Estimate
    """Tokens per second of a request, after its first commit; the mean over requests."""
    speedup: Estimate
    """Seconds per token of plain decoding over those of this cell, of requests that both have."""
    ttft_s: Estimate
    """Seconds to the first token; the mean over requests."""
    final_loop_share: Estimate
    """Output tokens in final loops (`specdec.eval.acceptance.loops`) over output tokens."""
    tokens_per_s: Estimate | None = None
    """Output tokens per second of the cell's run, prefill included; None for a category."""


@dataclass(frozen=True)
class Bin:
    """Drafts for which a quantity was in [low, high)."""

    low: float
    """The quantity's lower limit."""
    high: float | None
    """The quantity's upper limit; None for none."""
    num_drafts: int
    """Number of drafts."""
    mean: float | None
    """The quantity's mean over them; None without any."""
    acceptance: Estimate
    """Their acceptance."""


@dataclass(frozen=True)
class Calibration:
    """Acceptance of drafts reached, by a probability that each of them has."""

    ece: Estimate
    """Expected calibration error: the sum over bins of n_b / n |acceptance - mean probability|."""
    bins: list[Bin]
    """Ten equal bins of the probability."""


@dataclass(frozen=True)
class CheckPosition:
    """Acceptance of the drafts reached at one position, observed and expected from the model's own distributions."""

    position: int
    """Position of the draft, from 1."""
    num_reached: int
    """Drafts reached."""
    observed: float
    """The share of them that was accepted."""
    expected: float
    """The share that the model's distributions at the same contexts say."""
    z: float | None
    """How many standard deviations of the accepted count lie between; None where it can only be one number and is
    another."""


@dataclass(frozen=True)
class Check:
    """Whether the engine accepts what the model's own distributions say it should, at the same contexts.

    Given the past, each decision is a coin of known probability e: accepted - e are martingale differences, and z is
    standard normal whatever the dependence between requests and positions.
    """

    num_contexts: int
    """Verifications that were checked."""
    num_other_drafts: int
    """Drafts of the engine that are not the MTP layer's at the same contexts."""
    positions: list[CheckPosition]
    """The figures by draft position."""
    passed: bool
    """Whether all is as it should be."""
    message: str
    """The verdict in words."""


@dataclass(frozen=True)
class CellMetrics:
    """A cell of results.json.

    by_entropy, calibration, by_expected_acceptance, check and alpha come from the verifications that were analysed.
    """

    cell: Cell
    """The cell's settings."""
    num_requests: int
    """Requests."""
    num_output_tokens: int
    """Tokens generated."""
    num_target_forwards: int
    """Target forwards that decided a token of a request, counted once for each request."""
    num_verifications: int
    """Verifications of at least one draft."""
    all: Group
    """Figures of all requests."""
    categories: dict[str, Group]
    """Figures by category of prompts."""
    by_output_position: list[Bin]
    """Acceptance of draft 1, by output tokens before it."""
    by_entropy: list[Bin]
    """Acceptance of drafts reached, by the entropy of the target's distribution there, in nats."""
    calibration: Calibration
    """Acceptance of drafts reached, by the confidence in them: the largest probability of the draft's distribution."""
    by_expected_acceptance: Calibration
    """Acceptance of drafts reached, by the probability that the rule accepts them, the draft averaged out."""
    check: Check | None
    """Acceptance against the model's own distributions; None where nothing was analysed."""
    alpha: list[Estimate]
    """[K]: mean of sum min(p, q) at drafts reached."""
    by_prompt: ByPrompt
    """Counts that let runs be compared prompt by prompt."""
    warnings: list[str]
    """Why the figures may mislead."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the cell as in results.json, its settings first."""
        fields = asdict(self)
        settings: dict[str, Any] = fields.pop("cell")
        return settings | fields


def _warnings(group: Group) -> list[str]:
    share = group.final_loop_share.value
    if share is None or share <= MAX_LOOP_SHARE:
        return []
    return [
        f"{share:.1%} of the output tokens lie in final loops, more than {MAX_LOOP_SHARE:.0%}: acceptance and speed-up "
        "are those of repeating text"
    ]


def cell_metrics(cell: Cell, records: Seq[RequestRecord], plain: Seq[RequestRecord], wall_s: Seq[float]) -> CellMetrics:
    """Computes a cell's figures. The order of records does not matter, not even in the last digit: a run that was
    resumed has them in another.

    cell: its settings.
    records: its requests.
    plain: records of `cell.plain`, which `speedup` compares with; without any it is null, and with a plain cell's own
        records 1.
    wall_s: [repeats], seconds that the cell ran for each repeat.
    """
    records = sorted(records, key=lambda r: (r.prompt, r.turn, r.repeat))
    num_drafts, category = cell.num_speculative_tokens, np.array([r.category for r in records])
    prompts, cluster = np.unique([r.prompt for r in records], return_inverse=True)
    verifications, sums = Verifications.of(records), Sums.of(records, plain, num_drafts)
    drafts = Drafts.of(records, cluster, num_drafts)
    everything = _group(sums, cluster)
    return CellMetrics(
        cell=cell,
        num_requests=len(records),
        num_output_tokens=sum(r.num_output_tokens for r in records),
        num_target_forwards=sum(r.num_target_forwards for r in records),
        num_verifications=len(verifications.request),
        all=replace(everything, tokens_per_s=_total_speed(records, wall_s)),
        categories={str(name): _group_of(sums, cluster, category == name) for name in np.unique(category)},
        by_output_position=_by_output_position(verifications, cluster),
        by_entropy=_bins(drafts.cluster, drafts.entropy, drafts.accepted, ENTROPY_EDGES),
        calibration=_calibration(drafts, drafts.confidence),
        by_expected_acceptance=_calibration(drafts, drafts.expected),
        check=_check([r.analysis for r in records if r.analysis is not None], drafts),
        alpha=_alphas(drafts, num_drafts),
        by_prompt=ByPrompt.of(prompts, sums.by(cluster)),
        warnings=_warnings(everything),
    )


def _group(requests: Sums, cluster: Ints) -> Group:
    s = requests.by(cluster)
    drafted, accepted = s.drafted.sum(1, keepdims=True), s.accepted.sum(1, keepdims=True)
    unlimited = np.full_like(drafted, np.inf)
    columns = [  # numerator, denominator, what the numerator can be at most
        (s.accepted, s.reached, s.reached),
        (s.accepted, s.drafted, s.drafted),
        (accepted, s.verifications, drafted),
        (accepted, drafted, drafted),
        (s.decode_tokens, s.decode_forwards, unlimited),
        (s.rates, s.timed, unlimited),
        (s.ttft_s, s.requests, unlimited),
        (s.loop_tokens, s.output_tokens, s.output_tokens),
    ]
    numerators, denominators, most = map(np.hstack, zip(*columns))
    estimates = iter(ratios(numerators, denominators, most))
    (speedup,) = paired_ratios(s.plain_s, s.plain_tokens, s.paired_s, s.paired_tokens)
    num_drafts = s.drafted.shape[1]
    return Group(
        num_requests=int(s.requests.sum()),
        num_verifications=int(s.verifications.sum()),
        conditional=list(islice(estimates, num_drafts)),
        unconditional=list(islice(estimates, num_drafts)),
        mean_acceptance_length=next(estimates).plus(1),
        draft_efficiency=next(estimates),
        block_efficiency=next(estimates),
        tokens_per_s_per_request=next(estimates),
        ttft_s=next(estimates),
        final_loop_share=next(estimates),
        speedup=speedup,
    )


def _group_of(sums: Sums, cluster: Ints, chosen: Bools) -> Group:
    return _group(sums.only(chosen), _numbered(cluster[chosen]))


def _numbered(labels: Seq[int] | Ints) -> Ints:
    """Returns labels [n] as numbers from 0 on, in the order of the labels."""
    return np.unique(labels, return_inverse=True)[1]


def _total_speed(records: Seq[RequestRecord], wall_s: Seq[float]) -> Estimate:
    """Returns the tokens per second of whole runs. Its clusters are repeats, which are as independent as runs of one
    machine are."""
    tokens = sum_by(
        np.array([r.repeat for r in records]), np.array([[r.num_output_tokens] for r in records]), len(wall_s)
    )
    return ratios(tokens, np.array(wall_s)[:, None])[0]


def _by_output_position(verifications: Verifications, cluster: Ints) -> list[Bin]:
    """Returns acceptance of draft 1 by output position, up to the last bin that any verification falls into."""
    position, edges = verifications.output_position, list(FIRST_POSITION_EDGES)
    while edges[-1] <= position.max(initial=0):
        edges.append(2 * edges[-1])
    accepted = verifications.num_accepted > 0
    return _bins(cluster[verifications.request], position.astype(np.float64), accepted, np.array(edges, np.float64))


def _bins(cluster: Ints, quantity: Floats, accepted: Bools, edges: Floats) -> list[Bin]:
    """Sorts drafts into the bins [edges[b], edges[b + 1]) of a quantity. Without drafts there are no bins.

    cluster, quantity, accepted: [n], of each draft.
    edges: [bins + 1], ascending.
    """
    if len(cluster) == 0:
        return []
    counts, sums, hits = _by_cluster_and_bin(cluster, quantity, edges, np.ones(len(cluster)), quantity, accepted)
    means = sums.sum(0) / np.maximum(counts.sum(0), 1)
    return [
        Bin(low, high if math.isfinite(high) else None, int(count), mean if count else None, acceptance)
        for low, high, count, mean, acceptance in zip(
            edges.tolist(), edges[1:].tolist(), counts.sum(0), means.tolist(), ratios(hits, counts, counts)
        )
    ]


def _by_cluster_and_bin(cluster: Ints, quantity: Floats, edges: Floats, *values: Floats | Bools) -> list[Floats]:
    """Returns sums [clusters, bins] of each of the values [n]. What is beyond the edges counts in the first or last
    bin."""
    n, bins = int(cluster.max()) + 1, len(edges) - 1
    place = cluster * bins + np.clip(np.searchsorted(edges, quantity, side="right") - 1, 0, bins - 1)
    return [sum_by(place, x[:, None], n * bins).reshape(n, bins) for x in values]


def _calibration(drafts: Drafts, probability: Floats) -> Calibration:
    """Compares the acceptance of drafts with a probability of each, [n], from 0 to 1; those whose probability is NaN
    are left out."""
    known = ~np.isnan(probability)
    cluster, accepted, probability = drafts.cluster[known], drafts.accepted[known], probability[known]
    bins = _bins(cluster, probability, accepted, PROBABILITY_EDGES)
    if not bins:
        return Calibration(NO_ESTIMATE, [])
    counts, gaps = _by_cluster_and_bin(
        cluster, probability, PROBABILITY_EDGES, np.ones(len(probability)), accepted - probability
    )
    return Calibration(calibration_error(gaps, counts.sum(1)), bins)


def _alphas(drafts: Drafts, num_drafts: int) -> list[Estimate]:
    if len(drafts.cluster) == 0:
        return [NO_ESTIMATE] * num_drafts
    n, columns = int(drafts.cluster.max()) + 1, np.arange(num_drafts) == drafts.position[:, None]
    counts = sum_by(drafts.cluster, columns, n)
    return ratios(sum_by(drafts.cluster, columns * drafts.alpha[:, None], n), counts, counts)


def _check(analyses: list[Analysis], drafts: Drafts) -> Check | None:
    num_contexts = sum(len(a.indices) for a in analyses)
    if num_contexts == 0:
        return None
    positions = [
        _check_position(int(position), drafts.accepted[chosen], drafts.expected[chosen])
        for position in np.unique(drafts.position)
        for chosen in [drafts.position == position]
    ]
    num_other_drafts = sum(a.num_other_drafts for a in analyses)
    failed = [p for p in positions if p.z is None or abs(p.z) > MAX_Z]
    return Check(
        num_contexts,
        num_other_drafts,
        positions,
        not failed,
        _message(failed or positions, num_contexts, num_other_drafts, not failed),
    )


def _check_position(position: int, accepted: Bools, expected: Floats) -> CheckPosition:
    """Returns the figures of drafts [n] at one position.

    position: from 0.
    accepted: [n], whether each draft was accepted.
    expected: [n], the probability of that.
    """
    surplus, variance = float(accepted.sum() - expected.sum()), float((expected * (1 - expected)).sum())
    certain = 0.0 if surplus == 0 else None
    z = surplus / math.sqrt(variance) if variance > 0 else certain
    return CheckPosition(position + 1, len(accepted), float(accepted.mean()), float(expected.mean()), z)


def _message(worst: Seq[CheckPosition], num_contexts: int, num_other_drafts: int, passed: bool) -> str:
    other = f"; {num_other_drafts:,} of the engine's drafts are not the model's" if num_other_drafts else ""
    if passed:
        largest = max((abs(p.z) for p in worst if p.z is not None), default=0.0)
        where = f"at {num_contexts:,} contexts, largest |z| {largest:.1f}"
        return f"acceptance is what the model's distributions say {where}{other}"
    faults = ", ".join(
        f"{p.observed:.4f} of {p.num_reached:,} drafts at position {p.position} accepted, {p.expected:.4f} expected "
        + ("exactly" if p.z is None else f"(z = {p.z:.1f})")
        for p in worst
    )
    return f"acceptance is not what the model's distributions say at the same contexts: {faults}{other}"
