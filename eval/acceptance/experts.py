"""Counts how many distinct experts the tokens of one target forward choose together, whose weights it must read.

Tokens of one verification are a context's last token and its drafts; larger forwards are the tokens of verifications
of different requests, as a batch has them, the last of which is cut short where the number asks for it. The reference
value is that of tokens which choose k of E experts independently and evenly, E (1 - (1 - k / E)^t).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.eval.acceptance.analyse import Completion
from specdec.eval.acceptance.intervals import Estimate, ratios
from specdec.eval.acceptance.records import Floats
from specdec.eval.acceptance.replay import Context, Reader
from specdec.inspection.step_bytes import expected_distinct

GROUP_SIZES = (8, 16, 32, 64, 128)
LEAST_GROUPS = 4  # an interval from fewer groups says nothing
DRAWS = 32  # how often verifications are drawn for the same group of requests

Chosen = NDArray[np.bool_]  # [n, layers, K + 1, experts]: which experts the rows of n verifications choose


@dataclass(frozen=True)
class Point:
    """How many experts of a layer some tokens choose together."""

    num_tokens: int
    """How many tokens."""
    measured: Estimate
    """The mean number of distinct experts that they choose."""
    expected: float
    """The same if tokens chose evenly and independently."""


@dataclass(frozen=True)
class LayerExperts:
    """The figures of one layer."""

    layer: str
    """The layer's name in the checkpoint."""
    points: list[Point]
    """Its figures, by number of tokens."""


@dataclass(frozen=True)
class Experts:
    """The figures of a model."""

    num_experts: int
    """Routed experts of a layer, E."""
    experts_per_token: int
    """Experts that a token chooses, k."""
    layers: list[LayerExperts]
    """Every layer with experts."""
    mean: list[Point]
    """The means over these layers, by number of tokens."""

    def as_dict(self) -> dict[str, Any]:
        """Returns a document for JSON, see docs/results.md."""
        return asdict(self)


def measure_experts(reader: Reader, completions: Seq[Completion], num_drafts: int, seed: int = 0) -> Experts | None:
    """Counts the experts of verifications; None where none has `num_drafts` drafts.

    reader: runs the target.
    completions: the requests, with their verifications.
    num_drafts: verifications with fewer drafts are left out.
    seed: of the groups of requests that are drawn.
    """
    config = reader.target.config
    layers, chosen = _chosen(reader, completions, num_drafts)
    if not chosen:
        return None
    counts = {t: np.stack([_distinct(c[:, :, :t]).mean(0) for c in chosen]) for t in range(1, num_drafts + 2)}
    counts |= _grouped(chosen, num_drafts + 1, random.Random(seed))
    num_experts, per_token = config.n_routed_experts, config.num_experts_per_tok
    points = {t: _points(t, of_clusters, num_experts, per_token) for t, of_clusters in counts.items()}
    return Experts(
        num_experts,
        per_token,
        [
            LayerExperts(f"model.layers.{layer}", [of_layers[i] for of_layers in points.values()])
            for i, layer in enumerate(layers)
        ],
        [_points(t, c.mean(1, keepdims=True), num_experts, per_token)[0] for t, c in counts.items()],
    )


def _chosen(reader: Reader, completions: Seq[Completion], num_drafts: int) -> tuple[list[int], list[Chosen]]:
    """Returns the layers that have experts, and for each completion with such verifications what they chose."""
    found = []
    for completion in completions:
        full = [i for i, drafts in enumerate(completion.drafts) if len(drafts) == num_drafts]
        if full:
            found.append(_chosen_by(reader, completion, full))
    if not found:
        return [], []
    layers = np.flatnonzero((found[0] >= 0).all((1, 2, 3)))
    num_experts = reader.target.config.n_routed_experts
    return layers.tolist(), [_membership(ids[layers], num_drafts + 1, num_experts) for ids in found]


def _chosen_by(reader: Reader, completion: Completion, which: list[int]) -> NDArray[np.int64]:
    """Returns the expert ids [all layers, verifications, K + 1, k] of some verifications of a completion."""
    starts = [completion.starts[i] for i in which]
    (text,) = reader.read([completion.token_ids[: max(starts)]])
    pieces = []
    for first in range(0, len(which), reader.max_contexts):
        chunk = which[first : first + reader.max_contexts]
        contexts = [Context(text, completion.starts[i]) for i in chunk]
        rows = [[completion.token_ids[completion.starts[i] - 1], *completion.drafts[i]] for i in chunk]
        with reader.target.decoder.traced() as runs:
            reader.run_target(contexts, rows)
        ids = runs[0].expert_ids.cpu().numpy()
        pieces.append(ids.reshape(len(ids), len(chunk), -1, ids.shape[-1]))
    return np.concatenate(pieces, 1)


def _membership(ids: NDArray[np.int64], num_rows: int, num_experts: int) -> Chosen:
    chosen = np.zeros((ids.shape[1], len(ids), num_rows, num_experts), np.bool_)
    np.put_along_axis(chosen, ids.swapaxes(0, 1), True, -1)
    return chosen


def _distinct(chosen: Chosen) -> NDArray[np.int64]:
    """Returns the number of distinct experts, [n, layers], of chosen ones [n, layers, rows, experts]."""
    return chosen.any(2).sum(-1)


def _grouped(chosen: list[Chosen], num_rows: int, generator: random.Random) -> dict[int, Floats]:
    """Returns the mean number of distinct experts [groups, layers], by number of tokens. Groups have no request in
    common, so they are independent."""
    counts = {}
    for t in GROUP_SIZES:
        per_group = math.ceil(t / num_rows)
        if t <= num_rows or LEAST_GROUPS * per_group > len(chosen):
            continue
        order = generator.sample(range(len(chosen)), len(chosen))
        groups = [order[i : i + per_group] for i in range(0, len(order) - per_group + 1, per_group)]
        counts[t] = np.stack([_mean_of_group([chosen[i] for i in group], t, generator) for group in groups])
    return counts


def _mean_of_group(chosen: list[Chosen], num_tokens: int, generator: random.Random) -> Floats:
    """Returns the mean number of distinct experts [layers] over draws of one verification from each request."""
    drawn = [np.concatenate([c[generator.randrange(len(c))] for c in chosen], 1)[:, :num_tokens] for _ in range(DRAWS)]
    return _distinct(np.stack(drawn)).mean(0)


def _points(num_tokens: int, of_clusters: Floats, num_experts: int, per_token: int) -> list[Point]:
    """Returns the point of each layer, from the mean counts of clusters [clusters, layers]."""
    ones = np.ones_like(of_clusters)
    # A token always chooses per_token: where there is only one, nothing is at a limit that it might not reach.
    most = None if num_tokens == 1 else ones * min(num_experts, num_tokens * per_token)
    expected = expected_distinct(num_experts, per_token, num_tokens)
    return [Point(num_tokens, estimate, expected) for estimate in ratios(of_clusters, ones, most)]
