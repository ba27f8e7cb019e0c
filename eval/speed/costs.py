"""Measures the cost of forwards by number of rows at given batch sizes and draft lengths, for reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specdec import Engine
from specdec.auto_length.measure import Trial, measure_costs
from specdec.cost import CostTable

REPEATS = 15
CHAIN_LENGTH = 3


def measure_speed_costs(engine: Engine, batch_sizes: Sequence[int], draft_lengths: Sequence[int]) -> CostTable:
    """Measures forwards of every number of rows that these settings have in one step; the MTP layer's too, where the
    model has one."""
    shapes = sorted({(b, k + 1) for b in batch_sizes for k in draft_lengths}, key=lambda shape: math.prod(shape))
    trials = [Trial("target", b, rows) for b, rows in shapes]
    if engine.runtime.model.mtp is not None:
        trials += [Trial("extend", b, rows) for b, rows in shapes]
        trials += [Trial("chain", b, CHAIN_LENGTH) for b in batch_sizes]
    return measure_costs(engine.runtime, engine.tokenizer, trials, REPEATS, budget_s=math.inf)
