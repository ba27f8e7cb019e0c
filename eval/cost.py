"""The measured cost of forwards by number of rows, and the speed that it allows (algorithms: tokens per second =
tokens per iteration / (verification + draft extend + further draft steps))."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec import Engine
from specdec.batch import Extend, build_batch
from specdec.model.glm4_moe import Glm4MoeForCausalLM

REPEATS = 15


@dataclass(frozen=True)
class CostTable:
    """Seconds, by number of rows: a target forward with the choice of tokens, an MTP forward with the choice of one
    token per sequence. Rows in between are interpolated."""

    target: dict[int, float]
    mtp: dict[int, float]

    def predict(self, batch_size: int, num_draft_tokens: int, mean_acceptance_length: float) -> float:
        """Tokens per second of `batch_size` sequences that each draft `num_draft_tokens`."""
        step_s = interpolate(self.target, batch_size * (num_draft_tokens + 1))
        if num_draft_tokens:
            step_s += interpolate(self.mtp, batch_size * mean_acceptance_length)
            step_s += (num_draft_tokens - 1) * interpolate(self.mtp, batch_size)
        return batch_size * mean_acceptance_length / step_s


def interpolate(table: dict[int, float], rows: float) -> float:
    """Linear between the two nearest entries; beyond the last one in proportion to the rows."""
    known = sorted(table)
    if rows >= known[-1]:
        return table[known[-1]] * rows / known[-1]
    high = next(n for n in known if n >= rows)
    low = max((n for n in known if n <= rows), default=high)
    if low == high:
        return table[low]
    return table[low] + (table[high] - table[low]) * (rows - low) / (high - low)


@torch.inference_mode()
def measure_costs(
    engine: Engine, prompts: list[list[int]], batch_sizes: Sequence[int], draft_lengths: Sequence[int]
) -> CostTable:
    """Medians, all row counts in turn: rows are spread over the sequences as verification spreads them."""
    verifications = sorted({(b, b * (k + 1)) for b in batch_sizes for k in draft_lengths}, key=lambda pair: pair[1])
    target = {rows: _target_forward(engine, prompts, b, rows // b) for b, rows in verifications}
    mtp = {}
    if engine.runtime.model.mtp is not None:
        mtp = {rows: _mtp_forward(engine, prompts, b, rows // b) for b, rows in verifications}
    times: dict[Callable[[], object], list[float]] = {run: [] for run in (*target.values(), *mtp.values())}
    for _ in range(REPEATS):
        for run, samples in times.items():
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
    return CostTable(
        {rows: statistics.median(times[run]) for rows, run in target.items()},
        {rows: statistics.median(times[run]) for rows, run in mtp.items()},
    )


def _extends(engine: Engine, prompts: list[list[int]], batch_size: int, rows: int) -> list[Extend]:
    """The last `rows` tokens of each prompt, after those before them."""
    length = len(prompts[0])
    rows = min(rows, length)
    pages = -(-length // engine.config.page_size)
    tables = [list(range(b * pages, (b + 1) * pages)) for b in range(batch_size)]
    return [Extend(prompts[b][length - rows :], length - rows, tables[b]) for b in range(batch_size)]


def _target_forward(engine: Engine, prompts: list[list[int]], batch_size: int, rows: int) -> Callable[[], object]:
    model, kv_cache = engine.runtime.model.target, engine.runtime.kv_cache
    extends = _extends(engine, prompts, batch_size, rows)

    def run() -> object:
        batch = build_batch(extends, engine.config.page_size)
        return _argmaxes(model, model(batch.input_ids, batch.metadata, kv_cache))

    return run


def _mtp_forward(engine: Engine, prompts: list[list[int]], batch_size: int, rows: int) -> Callable[[], object]:
    mtp, target, kv_cache = engine.runtime.model.mtp, engine.runtime.model.target, engine.runtime.kv_cache
    assert mtp is not None
    extends = _extends(engine, prompts, batch_size, rows)
    previous = torch.randn(
        sum(len(e.token_ids) for e in extends), target.config.hidden_size, generator=torch.Generator().manual_seed(0)
    ).to(target.kernels.device, target.kernels.activation_dtype)

    def run() -> object:
        batch = build_batch(extends, engine.config.page_size)
        output = mtp.draft(previous, batch.input_ids, batch.metadata, kv_cache[-1])
        return _argmaxes(target, output.normed[:batch_size])

    return run


def _argmaxes(target: Glm4MoeForCausalLM, hidden: Tensor) -> list[int]:
    return target.kernels.head_argmax(hidden, target.head).tolist()
