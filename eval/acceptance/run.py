"""Runs all cells, one after the other and beside their plain cells, and puts the document together.

Within a temperature and batch size every cell completes some of the prompts, then the next cell its turn, so that a
slow moment of the machine meets all of them. The exact distributions behind a cell's verifications are computed between
the turns, never while the clock runs. Whatever is finished is on disk at once, and a run that was stopped goes on from
it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specdec import Engine
from specdec.errors import CheckpointError
from specdec.eval.acceptance.experts import measure_experts
from specdec.eval.acceptance.generate import analysed, fits, prompt_text, run_round
from specdec.eval.acceptance.metrics import CellMetrics, Check, cell_metrics
from specdec.eval.acceptance.own_drafter import DrafterSource, load_drafter
from specdec.eval.acceptance.plan import AcceptanceOptions, Cell, rounds
from specdec.eval.acceptance.records import RequestRecord
from specdec.eval.acceptance.replay import Reader
from specdec.eval.acceptance.results import checkpoint_sha256, provenance
from specdec.eval.acceptance.schema import SCHEMA, VERSION
from specdec.eval.acceptance.store import Store, as_document, as_record, part_name
from specdec.eval.machine import describe_machine, git_revision
from specdec.eval.prompts import Prompt, PromptSet, load_prompts
from specdec.kernels.progress import Progress as Loading
from specdec.kernels.progress import silent
from specdec.step.drafter import OwnDrafts

EXPERTS_NAME = "experts"
EXPERT_PROMPTS, EXPERT_TOKENS = 32, 48
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    done: int
    """Parts done."""
    total: int
    """All parts."""
    what: str
    """The part that comes next."""
    finished: CellMetrics | None = None
    """The cell that has just been finished, if one has."""


@dataclass(frozen=True)
class Part:
    """A cell's round."""

    cell: Cell
    """The cell."""
    repeat: int
    """Number of the repeat, from 0."""
    number: int
    """Number of the round, from 0."""
    prompts: range
    """Its prompts, by index."""

    @property
    def name(self) -> str:
        """A name that no other part has."""
        return part_name(self.cell, self.repeat, self.number)


def run_acceptance(
    options: AcceptanceOptions,
    folder: Path,
    *,
    resume: bool = False,
    command: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
    loading: Loading = silent,
) -> dict[str, Any]:
    """Measures everything; returns the document of results.json.

    options: what to measure.
    folder: keeps what is finished.
    resume: whether to go on from what the folder holds.
    command: as typed.
    progress: hears how far the run is.
    loading: hears how far the model is loaded, before `progress` hears anything.

    Raises ValueError for options that do not fit the checkpoint, a drafter that cannot be used, prompts that do not fit
    the context, and a folder with other results; CheckpointError for a checkpoint that has no MTP layer where no other
    drafter is given.
    """
    run = Run(options, folder, resume=resume, progress=progress, loading=loading)
    cells, experts = run.cells(), run.experts()
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "provenance": provenance(run.engine, command, run.store.started, sha256=run.sha256),
        "options": json.loads(json.dumps(asdict(options))),
        "prompts": run.prompts.as_dict() | {"sha256": _prompts_sha256(run.prompts)},
        "cells": [cell.as_dict() for cell in cells],
        "experts": experts,
    }


class Run:
    """A run: engines that share one model, prompts, and the store."""

    def __init__(
        self,
        options: AcceptanceOptions,
        folder: Path,
        *,
        resume: bool,
        progress: Callable[[Progress], None],
        loading: Loading,
    ) -> None:
        self.options, self.progress = options, progress
        self.own = None if options.drafter is None else load_drafter(options.drafter)
        self.engine = _load(options, self.own, loading)
        self.engines = {b: self._engine(b) for b in options.batch_sizes}
        self._drafts: dict[str, OwnDrafts] = {}
        self.prompts = _load_prompts(options, self.engine)
        self.sha256 = checkpoint_sha256(self.engine.checkpoint.index)
        self.store = Store.open(folder, self._identity(), resume=resume)
        self.reader = Reader(self.engine, max(options.num_speculative_tokens))
        self._warm: set[int] = set()

    def cells(self) -> list[CellMetrics]:
        """Runs what is not there yet; returns the figures of all cells."""
        parts = list(self._parts())
        done: dict[Cell, Records] = {cell: Records(self.options.repeats) for cell in self.options.cells}
        left = {cell: sum(part.cell == cell for part in parts) for cell in self.options.cells}
        metrics: dict[Cell, CellMetrics] = {}
        finished: CellMetrics | None = None
        for number, part in enumerate(parts):
            self.progress(Progress(number, len(parts) + 1, part.name, finished))
            done[part.cell].add(part, self._finished(part))
            left[part.cell] -= 1
            finished = None
            if left[part.cell] == 0:
                finished = metrics[part.cell] = self._metrics(part.cell, done)
        self.progress(Progress(len(parts), len(parts) + 1, EXPERTS_NAME, finished))
        return [metrics[cell] for cell in self.options.cells]

    def experts(self) -> dict[str, Any] | None:
        """Counts experts on requests of their own: greedy where a temperature is 0, else of the lowest temperature."""
        if not self.store.has(EXPERTS_NAME):
            options = replace(self.options, max_tokens=min(EXPERT_TOKENS, self.options.max_tokens))
            k, batch_size = max(options.num_speculative_tokens), max(options.batch_sizes)
            cell = next(
                c for c in sorted(options.cells, key=lambda c: c.temperature)
                if (c.num_speculative_tokens, c.batch_size) == (k, batch_size)
            )  # fmt: skip
            prompts = list(enumerate(self.prompts.prompts))[:EXPERT_PROMPTS]
            done = run_round(self._drafting(batch_size, EXPERTS_NAME), options, cell, prompts, 0)
            experts = measure_experts(self.reader, done.completions, k)
            self.store.save(EXPERTS_NAME, {"experts": None if experts is None else experts.as_dict()})
        experts_document: dict[str, Any] | None = self.store.load(EXPERTS_NAME)["experts"]
        return experts_document

    def _parts(self) -> Iterator[Part]:
        """Yields all parts, in the order in which they run."""
        options = self.options
        for repeat in range(options.repeats):
            for first in (cell for cell in options.cells if cell.num_speculative_tokens == 0):
                beside = [cell for cell in options.cells if cell.plain == first]
                for number, prompts in enumerate(rounds(len(self.prompts.prompts), first.batch_size)):
                    yield from (Part(cell, repeat, number, prompts) for cell in beside)

    def _finished(self, part: Part) -> dict[str, Any]:
        """Returns the part's document, which is made if it is not there."""
        if not self.store.has(part.name):
            self._warm_up(part.cell.batch_size)
            engine = self._drafting(part.cell.batch_size, part.cell.name)
            prompts = [(i, self.prompts.prompts[i]) for i in part.prompts]
            done = run_round(engine, self.options, part.cell, prompts, part.repeat)
            records = analysed(done, self.reader, part.cell, self._num_contexts(part))
            self.store.save(part.name, {"wall_s": done.wall_s, "records": [as_document(r) for r in records]})
        return self.store.load(part.name)

    def _num_contexts(self, part: Part) -> int:
        """Returns this part's share of `check_contexts`; 0 for plain decoding."""
        if part.cell.num_speculative_tokens == 0:
            return 0
        share = self.options.check_contexts / (len(self.prompts.prompts) * self.options.repeats)
        return int(share * len(part.prompts))

    def _engine(self, batch_size: int) -> Engine:
        """An engine that shares the model."""
        config = replace(self.engine.config, max_num_seqs=batch_size)
        drafter = None if self.own is None else self.own.make()
        return Engine(self.engine.checkpoint, self.engine.runtime, config, drafter)

    def _warm_up(self, batch_size: int) -> None:
        if batch_size not in self._warm:
            options = replace(self.options, max_tokens=min(WARM_UP_TOKENS, self.options.max_tokens))
            for cell in self.options.cells:
                if cell.batch_size == batch_size:
                    run_round(self.engines[batch_size], options, cell, [(0, self.prompts.prompts[0])], 0)
            self._warm.add(batch_size)

    def _drafting(self, batch_size: int, name: str) -> Engine:
        """The engine, with the drafter made for what bears this name, a cell or the experts.

        Cells draw with the same noise: a drafter that learns from what it sees would know what comes in the next one.
        """
        engine = self.engines[batch_size]
        if self.own is not None:
            if name not in self._drafts:
                self._drafts[name] = OwnDrafts(self.own.make(), engine.checkpoint.config.vocab_size)
            engine.core.drafter = self._drafts[name]
        return engine

    def _metrics(self, cell: Cell, done: dict[Cell, Records]) -> CellMetrics:
        metrics = cell_metrics(cell, done[cell].records, done[cell.plain].records, done[cell].wall_s)
        if metrics.check is None or self.reader.kernels.name == "reference":
            return metrics
        return replace(metrics, check=with_exact_drafts(metrics.check))

    def _identity(self) -> dict[str, Any]:
        """Returns all that results depend on."""
        return {
            **asdict(self.options),
            "drafter_sha256": None if self.own is None else self.own.sha256,
            "prompts": {"name": self.prompts.name, "sha256": _prompts_sha256(self.prompts)},
            "checkpoint": self.sha256,
            "machine": describe_machine(self.engine),
            "git_revision": git_revision(),
        }


class Records:
    """What a cell has shown so far: its requests, and the seconds `wall_s` that it ran, by repeat."""

    def __init__(self, repeats: int) -> None:
        self.records: list[RequestRecord] = []
        self.wall_s = [0.0] * repeats

    def add(self, part: Part, document: dict[str, Any]) -> None:
        """Adds a part that is finished."""
        self.records += map(as_record, document["records"])
        self.wall_s[part.repeat] += document["wall_s"]


def with_exact_drafts(check: Check) -> Check:
    """Returns a check that fails for any draft that is not the model's own, as is due on row-invariant kernels."""
    if check.num_other_drafts == 0:
        return check
    message = f"{check.num_other_drafts} drafts are not those of the MTP layer at the same contexts: {check.message}"
    return replace(check, passed=False, message=message)


def _prompts_sha256(prompts: PromptSet) -> str:
    """Returns a hash of all turns and categories, in order: sets with the same hash have the same prompts."""
    turns = json.dumps([[p.turns, p.category] for p in prompts.prompts])
    return hashlib.sha256(turns.encode()).hexdigest()


def _load(options: AcceptanceOptions, own: DrafterSource | None, loading: Loading) -> Engine:
    engine = Engine.from_pretrained(
        options.model, kernels=options.kernels, dtype=options.dtype, num_threads=options.num_threads,
        max_num_seqs=max(options.batch_sizes), mtp_recycling=options.mtp_recycling, prefix_caching=False,
        drafter=None if own is None else own.make(), progress=loading,
    )  # fmt: skip
    if own is None and engine.runtime.model.mtp is None:
        raise CheckpointError(
            f"{engine.checkpoint.folder} has no MTP layer: it does not speculate, there is no acceptance to measure; "
            "give a drafter of your own with --drafter"
        )
    activations = engine.runtime.model.target.kernels.activation_dtype
    if options.check_contexts > 0 and activations not in (torch.float32, torch.float64):
        raise ValueError(
            f"dtype = {options.dtype!r} computes in {activations}, in which a distribution depends on the batch by "
            "about 1e-2: acceptance cannot be checked against it; choose dtype = 'float32' or check_contexts = 0"
        )
    return engine


def _load_prompts(options: AcceptanceOptions, engine: Engine) -> PromptSet:
    """Returns the prompts that are asked for and whose first turn fits the context with its output. Raises ValueError
    for one that does not, unless such prompts are left out, and where none is left."""
    prompts = load_prompts(options.prompts, skip_bad=options.skip_bad).up_to(options.num_prompts)
    kept: list[Prompt] = []
    for prompt in prompts.prompts:
        token_ids = engine.checkpoint.encode(prompt_text(engine, options, prompt, []))
        if fits(engine, options, token_ids):
            kept.append(prompt)
        elif not options.skip_bad:
            raise ValueError(
                f"{prompt.source} of {prompts.name} has {len(token_ids)} tokens, which with max_tokens = "
                f"{options.max_tokens} must be from 1 to the context's {engine.max_model_len}: lower max_tokens, or "
                "leave such prompts out with --skip-bad"
            )
    if not kept:
        raise ValueError(f"no prompt of {prompts.name} fits the context of {engine.max_model_len} tokens")
    num_skipped = prompts.num_skipped + len(prompts.prompts) - len(kept)
    return replace(prompts, prompts=tuple(kept), num_skipped=num_skipped)
