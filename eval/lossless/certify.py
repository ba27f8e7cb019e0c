"""Runs all parts of a certificate, one after the other."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any, get_args

import torch

from specdec import Engine, SpeculationParams, __version__
from specdec.config import DraftMode
from specdec.eval.lossless.certificate import (
    Certificate,
    LosslessOptions,
)
from specdec.eval.lossless.equality import compare, coupled_cases, greedy_cases
from specdec.eval.lossless.plan import make_plan
from specdec.eval.lossless.sampling import certify_sampling
from specdec.kernels.progress import Progress, silent


def certify(options: LosslessOptions, progress: Progress = silent) -> Certificate:
    """Runs all parts. Raises CheckpointError for a checkpoint that cannot be certified, ValueError for options that do
    not fit it."""
    start = time.perf_counter()
    plan = make_plan(options, progress)
    sampling, failures = certify_sampling(plan, progress)
    greedy_speculations = [SpeculationParams(), SpeculationParams(min_draft_confidence=0.5)]
    greedy, found = compare(plan, "greedy", greedy_cases(plan), greedy_speculations, progress)
    failures += found
    coupled = None
    if "coupled" in options.rules:
        speculations = [SpeculationParams(3, "coupled", drafts) for drafts in get_args(DraftMode)]
        coupled, found = compare(plan, "coupled", coupled_cases(plan), speculations, progress)
        failures += found
    return Certificate(
        options=options,
        provenance=_provenance(plan.engine),
        combinations={c.name: c.described() for c in plan.combinations},
        prompts=plan.prompts,
        sampling=sampling,
        greedy=greedy,
        coupled=coupled,
        failures=failures,
        seconds=time.perf_counter() - start,
    )


def _provenance(engine: Engine) -> dict[str, Any]:
    kernels = engine.runtime.model.target.kernels
    return {
        "model": str(engine.checkpoint.folder),
        "vocab_size": engine.checkpoint.config.vocab_size,
        "kernels": kernels.name,
        "dtype": str(getattr(kernels, "weight_dtype", kernels.dtype)).removeprefix("torch."),
        "activation_dtype": str(kernels.activation_dtype).removeprefix("torch."),
        "kv_dtype": str(engine.runtime.kv_cache.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "max_num_seqs": engine.config.max_num_seqs,
        "specdec": __version__,
        "torch": version("torch"),
    }
