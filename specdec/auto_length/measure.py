"""Measures what forwards cost on this machine: the engine's own stages, on sequences and a cache made for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from specdec.cache.pages import allocate_kv_cache
from specdec.config import MAX_SPECULATIVE_TOKENS, EngineConfig, SamplingParams, SpeculationParams
from specdec.cost import CostTable
from specdec.errors import RowsError
from specdec.kernels.data import HiddenRows
from specdec.kernels.decisions import Drafts
from specdec.loading import Runtime
from specdec.model.tokenizer import Tokenizer
from specdec.request.sequence import Sequence
from specdec.request.text import OutputText
from specdec.step.commit import commit
from specdec.step.draft import MTPDrafts, NoDrafts
from specdec.step.scheduler import ScheduledSequence
from specdec.step.verify import TargetVerifier

log = logging.getLogger(__name__)

CONTEXT = 64  # tokens before those that are measured
MAX_PAIRS = 64  # the most pairs of one sequence that are measured
MOST_SEQUENCES = 64
REPEATS, BUDGET_S = 5, 0.8

_tables: dict[object, CostTable] = {}


def cost_table(
    runtime: Runtime, tokenizer: Tokenizer, config: EngineConfig, wrong: CostTable | None = None
) -> CostTable:
    """Returns the cost table of a model, backend and number of threads; it is measured once in a process.

    runtime: the model and its cache.
    tokenizer: the model's.
    config: says how many sequences a step may have.
    wrong: a table that has proved wrong, which is not returned again but measured anew.

    Raises what a forward raises.
    """
    target = runtime.model.target
    key = (target.config, target.kernels.name, target.kernels.dtype, config.max_num_seqs, torch.get_num_threads())
    if key not in _tables or _tables[key] is wrong:
        sizes = [size for size in (1, 4, 16, MOST_SEQUENCES) if size < config.max_num_seqs]
        sizes.append(min(config.max_num_seqs, MOST_SEQUENCES))
        start_s = time.perf_counter()
        try:
            table = _tables[key] = measure_costs(runtime, tokenizer, trials(sizes))
        except RowsError as error:  # which rows failed is of no interest
            raise error.error from error
        _log_costs(table, time.perf_counter() - start_s)
    return _tables[key]


def _log_costs(table: CostTable, seconds: float) -> None:
    milliseconds = [1e3 * s for s in (table.target_s(1), table.target_s(4), table.extend_s(1), table.step_s(1))]
    log.info(
        "measured costs in %.1f s: a forward of 1 row takes %.3g ms, of 4 rows %.3g; a first draft %.3g, a next %.3g",
        seconds, *milliseconds,
    )  # fmt: skip
    log.debug("costs: %s", table)


@dataclass(frozen=True)
class Trial:
    """Something whose time is measured."""

    part: Literal["target", "sampled", "extend", "chain"]
    """What runs. "target": the target's forward over a last token and drafts, with argmaxes. "sampled": the same with
    sampled tokens. "extend": the MTP layer over pending pairs, with one draft. "chain": the MTP layer over one pair,
    with several drafts."""
    num_sequences: int
    """Sequences that take part."""
    rows: int
    """Rows of each sequence: tokens of the target, pairs of "extend", drafts of "chain"."""

    @property
    def num_rows(self) -> int:
        """Rows of all sequences."""
        return self.num_sequences * self.rows


def trials(batch_sizes: Seq[int]) -> list[Trial]:
    """Returns what is to be measured for these batch sizes, the most important first."""
    found = [Trial("target", 1, 1), Trial("target", 1, 4), Trial("extend", 1, 1), Trial("chain", 1, 3)]
    for size in batch_sizes:
        found += [Trial("target", size, rows) for rows in (1, 2, 3, 4, 6, MAX_SPECULATIVE_TOKENS + 1)]
        found += [Trial("extend", size, 1), Trial("extend", size, 4), Trial("chain", size, 3)]
    found += [Trial("sampled", batch_sizes[0], 6), Trial("target", 1, 8), Trial("extend", 1, MAX_PAIRS)]
    found += [Trial("target", size, 1) for size in (8, 12) if size <= max(batch_sizes)]
    return list(dict.fromkeys(found))


@torch.inference_mode()
def measure_costs(
    runtime: Runtime, tokenizer: Tokenizer, wanted: Seq[Trial], repeats: int = REPEATS, budget_s: float = BUDGET_S
) -> CostTable:
    """Measures a cost table: of each trial the lower quartile of its runs, which are on different tokens and so take
    different experts. The trials take turns.

    runtime: the model and its cache.
    tokenizer: the model's.
    wanted: what to measure; trials that do not fit into the context are left out.
    repeats: runs of each trial.
    budget_s: seconds after which it ends, but for the first four trials, which run once at least.

    Raises RowsError where a forward fails.
    """
    bench = Bench(runtime, tokenizer, max(trial.num_sequences for trial in wanted))
    wanted = [trial for trial in wanted if bench.length + trial.rows <= runtime.max_model_len]
    times: dict[Trial, list[float]] = {}
    start = time.perf_counter()
    for repeat in range(repeats):
        for number, trial in enumerate(wanted):
            if (repeat > 0 or number >= 4) and time.perf_counter() - start > budget_s:
                break
            run = bench.run(trial)
            if repeat == 0 and number < 4:
                bench.run(trial)()  # warms up
            times.setdefault(trial, []).append(_seconds(run, bench.device))
    return _table({trial: sorted(seconds)[len(seconds) // 4] for trial, seconds in times.items()})


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(seconds: dict[Trial, float]) -> CostTable:
    """Returns a table of the measured seconds. What a sequence costs beyond its rows is taken out of the target's
    entries; more rows never cost less than fewer."""
    # 1) What a sequence costs beyond its rows: n sequences of one row each against one sequence of n rows.
    sequence_s = sampled_s = 0.0
    for number in sorted(trial.rows for trial in seconds if trial.part == "target" and trial.num_sequences == 1):
        apart, together = Trial("target", number, 1), Trial("target", 1, number)
        if number > 1 and apart in seconds:  # the largest such pair decides
            sequence_s = max(0.0, (seconds[apart] - seconds[together]) / (number - 1))
    # 2) Seconds by number of rows, of each part by itself.
    target: dict[int, list[float]] = {}
    extend: dict[int, list[float]] = {}
    step: dict[int, list[float]] = {}
    for trial, s in seconds.items():
        if trial.part == "target":
            target.setdefault(trial.num_rows, []).append(max(s / 2, s - sequence_s * trial.num_sequences))
        elif trial.part == "sampled":
            argmax = seconds[Trial("target", trial.num_sequences, trial.rows)]
            sampled_s = max(0.0, (s - argmax) / trial.num_rows)
        elif trial.part == "extend":
            extend.setdefault(trial.num_rows, []).append(s)
        elif Trial("extend", trial.num_sequences, 1) in seconds:
            further = (s - seconds[Trial("extend", trial.num_sequences, 1)]) / (trial.rows - 1)
            step.setdefault(trial.num_sequences, []).append(max(1e-7, further))
    return CostTable(_rising(target), _rising(extend), _rising(step), sequence_s, sampled_s)


def _rising(entries: dict[int, list[float]]) -> dict[int, float]:
    """Returns for each number of rows the least of its seconds and of those of more rows."""
    rows = sorted(entries, reverse=True)
    least = accumulate((min(entries[n]) for n in rows), min)
    return dict(sorted(zip(rows, least)))


class Bench:
    """Makes the sequences that trials run on, of random tokens, in a cache of their own."""

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, most_sequences: int) -> None:
        target, mtp, cache = runtime.model.target, runtime.model.mtp, runtime.kv_cache
        self.tokenizer, self.page_size, self.device = tokenizer, cache.shape[3], cache.device
        length = min(CONTEXT, runtime.max_model_len // 2)
        self.num_pages = -(-(length + MAX_PAIRS) // self.page_size)
        # its own pages: those of the engine may be in use
        own = allocate_kv_cache(
            target.config, cache.shape[0], most_sequences * self.num_pages, self.page_size, cache.dtype, cache.device
        )
        self.verifier = TargetVerifier(target, own, self.page_size)
        self.drafter = NoDrafts() if mtp is None else MTPDrafts(target, mtp, own[-1], self.page_size, "post_norm")
        self.generator = torch.Generator().manual_seed(0)
        self.vocab_size, self.length = target.config.vocab_size, length
        self.hidden = torch.randn(MAX_PAIRS, target.config.hidden_size, generator=self.generator).to(
            target.kernels.device, target.kernels.activation_dtype
        )

    def run(self, trial: Trial) -> Callable[[], object]:
        """Returns a function that runs a trial once, on tokens that were drawn for it."""
        if trial.part in ("target", "sampled"):
            temperature = 1.0 if trial.part == "sampled" else 0.0
            scheduled = self._scheduled(trial.num_sequences, 1, trial.rows - 1, temperature)
            drafts = Drafts.of([self._tokens(trial.rows - 1) for _ in scheduled])
            return lambda: commit(scheduled, self.verifier.verify(scheduled, drafts))
        num_pairs, num_drafts = (trial.rows, 1) if trial.part == "extend" else (1, trial.rows)
        scheduled = self._scheduled(trial.num_sequences, num_pairs, num_drafts)
        return lambda: self.drafter.draft(scheduled)

    def _scheduled(
        self, num_sequences: int, num_pairs: int, num_drafts: int, temperature: float = 0.0
    ) -> list[ScheduledSequence]:
        params = SamplingParams(temperature=temperature)
        return [
            ScheduledSequence(self._sequence(number, num_pairs, params), 1, num_drafts)
            for number in range(num_sequences)
        ]

    def _sequence(self, number: int, num_pairs: int, params: SamplingParams) -> Sequence:
        sequence = Sequence(
            f"cost-{number}", self._tokens(self.length + num_pairs), params, SpeculationParams(), 0,
            self.length + MAX_PAIRS, frozenset(), OutputText(self.tokenizer, params),
        )  # fmt: skip
        sequence.page_table = list(range(number * self.num_pages, (number + 1) * self.num_pages))
        sequence.num_computed_tokens = self.length + num_pairs - 1
        sequence.num_mtp_tokens = self.length - 1
        sequence.pending_hidden = [HiddenRows(self.hidden, 0, num_pairs)]
        return sequence

    def _tokens(self, count: int) -> list[int]:
        return torch.randint(self.vocab_size, (count,), generator=self.generator).tolist()
