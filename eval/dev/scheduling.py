"""Measures what a step costs beside the model: scheduling, pages, prefix cache, commit and statistics, by the number of
requests that run.

    python -m specdec.eval.dev.scheduling [--batch-sizes 1,2,4,8,16,32,64] [--steps 600] [-k 3] [--warm]

The stages' results are made up: drafts are accepted at random and the forward does nothing. As soon as a request ends
another one arrives, whose prompt begins like the others', so admissions, hits and publishing are in the figures; the
median step has none or few of them. Between steps the processor's caches are emptied, as weights that pass through
them would do (not with --warm). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from specdec.auto_length.controller import AutoDraftLength
from specdec.cache.pages import PagePool
from specdec.config import EngineConfig, SamplingParams, SpeculationParams
from specdec.cost import CostTable
from specdec.kernels.data import HiddenRows
from specdec.metrics.engine import EngineStats
from specdec.request.sequence import Sequence
from specdec.request.text import OutputText
from specdec.step.commit import commit
from specdec.step.draft_length import DraftLength
from specdec.step.scheduler import ScheduledSequence, Scheduler
from specdec.step.verify import TargetResult

PROMPT_TOKENS, SHARED_TOKENS, MAX_TOKENS, VOCAB_SIZE = 300, 200, 128, 50_000
CACHE_BYTES = 64 * 2**20  # more than the last-level cache's share of one core
HIDDEN = torch.zeros(1, 1)


@dataclass(frozen=True)
class StepCost:
    """Microseconds of one step, all requests together."""

    batch_size: int
    """Requests that run."""
    schedule_us: float
    """Median of scheduling."""
    commit_us: float
    """Median of the commit, with what the scheduler does after it."""
    statistics_us: float
    """Median of the engine's statistics."""
    median_us: float
    """Median of all three together."""
    mean_us: float
    """Mean of all three together."""
    p99_us: float
    """99 % quantile of all three together."""


class _NoText(OutputText):
    """No text at all: it is not the scheduler's business."""

    def __init__(self) -> None: ...

    def push(self, token_id: int) -> bool:
        return False

    def flush(self) -> bool:
        return False


class _Load:
    """Keeps `batch_size` requests running at any time."""

    def __init__(self, batch_size: int, k: int) -> None:
        self.rng, self.k, self.batch_size = random.Random(0), k, batch_size
        self.stem = self._tokens(SHARED_TOKENS)
        config = EngineConfig(max_num_seqs=batch_size)
        pages = batch_size * -(-(PROMPT_TOKENS + MAX_TOKENS) // config.page_size)
        self.scheduler = Scheduler(PagePool(pages, config.page_size), batch_size, config.token_budget)
        self.draft_length: DraftLength = AutoDraftLength(_nothing_to_measure)
        self.stats = EngineStats(pages)

    def refill(self) -> None:
        while len(self.scheduler.running) + len(self.scheduler.waiting) < self.batch_size:
            prompt = self.stem + self._tokens(PROMPT_TOKENS - SHARED_TOKENS)
            self.scheduler.add(
                Sequence(
                    request_id="",
                    prompt_token_ids=prompt,
                    params=SamplingParams(max_tokens=MAX_TOKENS),
                    speculation=SpeculationParams(self.k),
                    seed=0,
                    max_total_tokens=len(prompt) + self.rng.randint(MAX_TOKENS // 2, MAX_TOKENS),
                    end_token_ids=frozenset(),
                    output=_NoText(),
                )
            )

    def result(self, scheduled: Seq[ScheduledSequence]) -> TargetResult:
        outputs = [self._tokens(self.rng.randint(0, s.num_draft_tokens) + 1) if s.samples else [] for s in scheduled]
        hidden = [HiddenRows(HIDDEN, 0, s.num_new_tokens + s.num_draft_tokens) for s in scheduled]
        nothing: list[list[Any]] = [[] for _ in scheduled]
        return TargetResult(outputs, nothing, hidden, nothing)

    def _tokens(self, count: int) -> list[int]:
        return self.rng.choices(range(VOCAB_SIZE), k=count)


def _nothing_to_measure(wrong: CostTable | None) -> CostTable:
    raise AssertionError("no request asks for it")


def measure(batch_size: int, num_steps: int, k: int, *, warm: bool) -> StepCost:
    """Times `num_steps` steps, after as many steps as a request has tokens.

    batch_size: requests that run.
    k: draft tokens per step.
    warm: whether the processor's caches are left as they are between steps.
    """
    load = _Load(batch_size, k)
    scheduler, draft_length, stats = load.scheduler, load.draft_length, load.stats
    cache = np.zeros(CACHE_BYTES, np.uint8)
    times = []
    for step in range(num_steps + MAX_TOKENS):
        load.refill()
        if not warm:
            cache += 1
        start = time.perf_counter()
        scheduled = draft_length.choose(scheduler.schedule())
        planned = time.perf_counter()
        result = load.result(scheduled)
        drafts = [[0] * s.num_draft_tokens for s in scheduled]
        decided = time.perf_counter()
        records = commit(scheduled, result)
        draft_length.record(scheduled, drafts, result.output_token_ids)
        scheduler.remove_finished()
        committed = time.perf_counter()
        stats.record_step(scheduled, records, start, committed, draft_length)
        for s in scheduled:
            if s.sequence.finished:
                stats.record_finished(s.sequence)
        stats.record_state(scheduler)
        if step >= MAX_TOKENS:
            times.append((planned - start, committed - decided, time.perf_counter() - committed))
    scheduler.check_integrity()
    parts = np.array(times) * 1e6  # [steps, 3]
    whole = parts.sum(1)
    schedule_us, commit_us, statistics_us = np.median(parts, 0).tolist()
    return StepCost(
        batch_size=batch_size,
        schedule_us=schedule_us,
        commit_us=commit_us,
        statistics_us=statistics_us,
        median_us=float(np.median(whole)),
        mean_us=float(whole.mean()),
        p99_us=float(np.quantile(whole, 0.99)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,32,64")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("-k", "--num-speculative-tokens", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="leave the processor's caches as they are")
    args = parser.parse_args()
    print("| requests | schedule, us | commit, us | statistics, us | all: median | mean | 99 % |")
    print("|---|---|---|---|---|---|---|")
    costs = []
    for batch_size in map(int, args.batch_sizes.split(",")):
        c = measure(batch_size, args.steps, args.num_speculative_tokens, warm=args.warm)
        costs.append(c)
        print(
            f"| {c.batch_size} | {c.schedule_us:.0f} | {c.commit_us:.0f} | {c.statistics_us:.0f} | {c.median_us:.0f} "
            f"| {c.mean_us:.0f} | {c.p99_us:.0f} |",
            flush=True,
        )
    print(json.dumps({"steps": args.steps, "warm": args.warm, "costs": [asdict(c) for c in costs]}))


if __name__ == "__main__":
    main()
