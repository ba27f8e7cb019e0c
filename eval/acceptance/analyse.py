"""Computes the exact distributions behind an engine's own verifications: teacher-forced at its contexts, with its
drafts.

If the engine's MTP path is sound, every decision about a draft is a coin with the probability computed here, whatever
came before; a sum of them is off by more than noise when the engine feeds its MTP layer anything else. Text-uniform
averages would not do: iterations start after rejections, where drafts are worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specdec import SpeculationParams
from specdec.eval.acceptance.laws import at_drafts, conditional_acceptance, entropy, overlap
from specdec.eval.acceptance.records import Analysis, Floats
from specdec.eval.acceptance.replay import Chains, Context, Reader
from specdec.kernels.decisions import GREEDY, RowSampling
from specdec.kernels.operations import Operations
from specdec.kernels.reference import lowest_argmax
from specdec.request.seeds import Stream


@dataclass(frozen=True)
class Drawing:
    """How drafts are drawn, as `specdec.step.sampling` derives it from a request."""

    temperature: float
    """The request's temperature; 0: target and drafts are argmaxes."""
    speculation: SpeculationParams
    """The request's speculation."""

    @property
    def point_masses(self) -> bool:
        """Whether drafts are argmaxes."""
        return self.temperature == 0 or self.speculation.draft_sampling == "greedy"

    @property
    def scale(self) -> float:
        """Factor of the logits; at temperature 0 the softmax is only reported, as it is."""
        return 1 / self.temperature if self.temperature > 0 else 1.0

    def rows(self, seeds: Seq[int], starts: Seq[int]) -> RowSampling:
        """Returns how draft 1 is drawn. seeds: [n], of the requests. starts: [n], tokens of the contexts."""
        stream = Stream.TARGET if self.speculation.verification == "coupled" else Stream.DRAFT
        n = len(seeds)
        return RowSampling(
            scales=[self.scale] * n,
            top_k=[0] * n,
            top_p=[1.0] * n,
            min_p=[0.0] * n,
            seeds=list(seeds),
            streams=[GREEDY if self.point_masses else int(stream)] * n,
            positions=list(starts),
            starts=list(starts) if stream == Stream.DRAFT else [0] * n,
        )


def laws_of(chains: Chains, drawing: Drawing, kernels: Operations) -> tuple[Tensor, Tensor | None]:
    """Returns p and q, [n, K, V] fp64; q is None where drafts are point masses, as without an MTP layer all are, and at
    temperature 0 p is one too. They are computed as the engine does it: the softmax is the kernels', in their
    precision."""
    if drawing.temperature == 0:
        choices = lowest_argmax(chains.target).unsqueeze(-1)
        return torch.zeros_like(chains.target, dtype=torch.float64).scatter(-1, choices, 1.0), None
    p = softmax(kernels, chains.target, drawing.scale)
    return p, None if drawing.point_masses or chains.draft is None else softmax(kernels, chains.draft, drawing.scale)


def softmax(kernels: Operations, logits: Tensor, scale: float) -> Tensor:
    """Returns the softmax of scale * logits, [n, K, V] in fp64, of logits [n, K, V]."""
    flat = logits.flatten(0, 1)
    return kernels.softmax(flat, [scale] * len(flat)).double().view_as(logits)


@dataclass(frozen=True)
class Completion:
    """A request, with the n verifications that are analysed: the first ones that had drafts."""

    token_ids: list[int]
    """Prompt and output."""
    seed: int
    """The request's seed."""
    starts: list[int]
    """[n]: tokens before each verification."""
    drafts: list[list[int]]
    """[n]: the drafts of each."""


def analyse(
    reader: Reader, completions: Seq[Completion], temperature: float, speculation: SpeculationParams
) -> list[Analysis]:
    """Returns one Analysis per completion, with K = num_speculative_tokens columns.

    reader: runs target and MTP layer.
    completions: the requests.
    temperature, speculation: what they asked for, all alike.
    """
    drawing, num_drafts = Drawing(temperature, speculation), speculation.max_draft_tokens
    tables = [_Table(len(c.starts), num_drafts) for c in completions]
    texts = [c.token_ids[: max(c.starts, default=0)] for c in completions]
    wanted = [number for number, text in enumerate(texts) if text]
    for group in reader.groups([texts[number] for number in wanted]):
        numbers = [wanted[i] for i in group]
        read = dict(zip(numbers, reader.read([texts[number] for number in numbers])))
        for places, k in _chunks(completions, numbers, reader.max_contexts):
            contexts = [Context(read[number], completions[number].starts[i]) for number, i in places]
            seeds = [completions[number].seed for number, _ in places]
            given = torch.tensor([completions[number].drafts[i] for number, i in places])
            rows = drawing.rows(seeds, [c.start for c in contexts])
            chains = reader.chains(contexts, rows, k, given)
            values = _values(chains, drawing, reader.operations)
            different = [0] * len(places)
            if chains.choices is not None:
                different = (chains.choices != chains.drafts).sum(1).tolist()
            for row, (number, i) in enumerate(places):
                tables[number].fill(i, values[row], different[row])
    return [table.analysis() for table in tables]


def _values(chains: Chains, drawing: Drawing, kernels: Operations) -> Floats:
    """Returns expected, confidence, entropy and alpha of `Analysis`, [n, 4, K]. Confidence and entropy are always of a
    softmax, even where the distributions are point masses, at temperature 0 and for greedy drafts. Confidence is NaN
    without an MTP layer."""
    p, q = laws_of(chains, drawing, kernels)
    alpha = at_drafts(p, chains.drafts) if q is None else overlap(p, q)
    if drawing.temperature == 0:  # greedy verification judges one draft after the other whatever the request's rule is
        expected, p = alpha, softmax(kernels, chains.target, drawing.scale)
    else:
        expected = conditional_acceptance(drawing.speculation.verification, p, q, chains.drafts)
    if chains.draft is None:
        confidence = torch.full_like(alpha, torch.nan)
    else:
        confidence = (softmax(kernels, chains.draft, drawing.scale) if q is None else q).amax(-1)
    return torch.stack([expected, confidence, entropy(p), alpha], 1).cpu().numpy()


def _chunks(completions: Seq[Completion], numbers: Seq[int], size: int) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Yields verifications (completion, i-th) with equally many drafts, up to `size` together, and how many drafts."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    for number in numbers:
        for i, drafts in enumerate(completions[number].drafts):
            by_length.setdefault(len(drafts), []).append((number, i))
    for k, places in sorted(by_length.items()):
        for first in range(0, len(places), size):
            yield places[first : first + size], k


class _Table:
    """An Analysis that is being filled."""

    def __init__(self, num_verifications: int, num_drafts: int) -> None:
        self.values = np.full((num_verifications, 4, num_drafts), np.nan)
        self.num_other_drafts = 0

    def fill(self, i: int, values: Floats, num_other_drafts: int) -> None:
        self.values[i, :, : values.shape[1]] = values
        self.num_other_drafts += num_other_drafts

    def analysis(self) -> Analysis:
        expected, confidence, entropies, alpha = self.values.swapaxes(0, 1)
        return Analysis(np.arange(len(self.values)), expected, confidence, entropies, alpha, self.num_other_drafts)
