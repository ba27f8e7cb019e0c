"""Adds up acceptance by rule, way of drafting, temperature and K from chains of drafts at many contexts.

Noise of the rules and the last draft are averaged out (`specdec.eval.acceptance.laws`). Intervals are over texts.

Shapes: n contexts, K drafts.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from specdec import SpeculationParams
from specdec.config import DraftMode, VerificationRule
from specdec.eval.acceptance.analyse import Drawing, laws_of
from specdec.eval.acceptance.intervals import Estimate, ratios
from specdec.eval.acceptance.laws import unconditional_acceptance
from specdec.eval.acceptance.records import Floats, Ints
from specdec.eval.acceptance.replay import Chains
from specdec.kernels.operations import Operations


@dataclass(frozen=True)
class Proposal:
    """One way of drafting at every context."""

    draft_sampling: DraftMode
    """Whether drafts are drawn or argmaxes."""
    temperatures: tuple[float, ...]
    """Temperatures of the target that its drafts serve; for sampled ones the one that they were drawn at."""

    @property
    def name(self) -> str:
        """A name that no other way of drafting has."""
        return "greedy" if self.draft_sampling == "greedy" else f"sampled-{self.temperatures[0]!r}"

    def drawing(self, temperature: float) -> Drawing:
        """Returns how drafts are drawn at a temperature, with independent noise at every context: that of the rejection
        rules."""
        return Drawing(temperature, SpeculationParams(1, "token", self.draft_sampling))


def proposals(temperatures: Seq[float], draft_sampling: Seq[DraftMode]) -> list[Proposal]:
    """Returns the ways of drafting that these settings need; at temperature 0 drafts are greedy in any case."""
    greedy = tuple(t for t in temperatures if t == 0 or "greedy" in draft_sampling)
    found = [Proposal("greedy", greedy)] if greedy else []
    return found + [Proposal("sampled", (t,)) for t in temperatures if t > 0 and "sampled" in draft_sampling]


@dataclass(frozen=True)
class Setting:
    """One combination of settings."""

    temperature: float
    """Temperature of target and drafts."""
    verification: str
    """The rule; "greedy" at temperature 0."""
    draft_sampling: str
    """Whether drafts are "sampled" or "greedy"."""


@dataclass(frozen=True)
class Row:
    """The figures of one setting."""

    setting: Setting
    """The setting."""
    unconditional: list[Estimate]
    """[K]: A_i, the probability that at least i drafts are accepted."""
    conditional: list[Estimate]
    """[K]: A_i / A_{i-1}."""
    mean_acceptance_length: dict[int, Estimate]
    """Tokens per verification, the last one included, by K."""

    def as_dict(self) -> dict[str, Any]:
        """Returns a document for JSON."""
        lengths = [{"num_speculative_tokens": k, **asdict(e)} for k, e in self.mean_acceptance_length.items()]
        return {
            **asdict(self.setting),
            "unconditional": [asdict(e) for e in self.unconditional],
            "conditional": [asdict(e) for e in self.conditional],
            "mean_acceptance_length": lengths,
        }


class Tally:
    """Sums of A_i by text and setting."""

    def __init__(self, num_texts: int, num_drafts: int) -> None:
        self.num_texts, self.num_drafts = num_texts, num_drafts
        self._counts: dict[Setting, Floats] = {}  # [texts, 1]
        self._sums: dict[Setting, Floats] = {}  # [texts, K]

    def add(
        self, proposal: Proposal, chains: Chains, texts: Ints, rules: Seq[VerificationRule], kernels: Operations
    ) -> None:
        """Adds chains of drafts.

        proposal: how they were drafted.
        chains: the drafts at n contexts, with the logits.
        texts: [n], number of each context's text.
        rules: the rules to compute acceptance of.
        kernels: compute the softmax as the engine does.
        """
        for temperature in proposal.temperatures:
            p, q = laws_of(chains, proposal.drawing(temperature), kernels)
            if temperature == 0:
                self._add(
                    Setting(0.0, "greedy", "greedy"), texts, unconditional_acceptance("token", p, q, chains.drafts)
                )
                continue
            for rule in rules:
                accepted = unconditional_acceptance(rule, p, q, chains.drafts)
                self._add(Setting(temperature, rule, proposal.draft_sampling), texts, accepted)

    def rows(self, lengths: Seq[int]) -> list[Row]:
        """Returns the figures by temperature. lengths: the K of mean_acceptance_length."""
        settings = sorted(self._counts, key=lambda setting: setting.temperature)
        return [_row(setting, self._counts[setting], self._sums[setting], lengths) for setting in settings]

    def _add(self, setting: Setting, texts: Ints, accepted: Tensor) -> None:
        counts = self._counts.setdefault(setting, np.zeros((self.num_texts, 1)))
        sums = self._sums.setdefault(setting, np.zeros((self.num_texts, self.num_drafts)))
        np.add.at(counts, texts, 1)
        np.add.at(sums, texts, accepted.cpu().numpy())


def _row(setting: Setting, counts: Floats, sums: Floats, lengths: Seq[int]) -> Row:
    all_counts = counts.repeat(sums.shape[1], 1)
    totals, positions = sums.cumsum(1), np.arange(1, sums.shape[1] + 1)
    added = ratios(totals, all_counts, all_counts * positions)
    return Row(
        setting,
        unconditional=ratios(sums, all_counts, all_counts),
        conditional=ratios(sums, np.hstack([counts, sums[:, :-1]])),
        mean_acceptance_length={k: added[k - 1].plus(1) for k in lengths},
    )


def print_rows(title: str, rows: Seq[Row], out: Console) -> None:
    """Prints one line per setting: conditional acceptance by draft position, then tokens per verification by K."""
    table = Table(title=title, title_justify="left")
    lengths = list(rows[0].mean_acceptance_length) if rows else []
    positions = range(1, len(rows[0].conditional) + 1) if rows else []
    for name in ("temperature", "rule", "drafts"):
        table.add_column(name, no_wrap=True)
    for name in (*(f"draft {i}" for i in positions), *(f"K={k}" for k in lengths)):
        table.add_column(name, justify="right")
    for row in rows:
        figures = [*row.conditional, *row.mean_acceptance_length.values()]
        digits = [3] * len(row.conditional) + [2] * len(lengths)
        cells = ["" if e.value is None else f"{e.value:.{n}f}" for e, n in zip(figures, digits)]
        setting = row.setting
        table.add_row(f"{setting.temperature:g}", setting.verification, setting.draft_sampling, *cells)
    out.print(table)
    out.print(
        "draft i: acceptance given that those before were accepted; K: tokens per verification, the last included"
    )
