"""Inspects a checkpoint: what it is, what it needs, and whether its MTP layer works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from specdec.config import EngineConfig
from specdec.errors import NotEnoughMemoryError
from specdec.inspection.floors import Floor, floors
from specdec.inspection.memory import RESERVE_BYTES, Fit, MemoryLine, fits, known_capabilities, memory_table
from specdec.kernels.flashinfer.requirements import (
    LEAST_CAPABILITY,
    Paths,
    Requirement,
    missing,
    paths,
    requirements,
    visible_capability,
)
from specdec.kernels.progress import Progress, silent
from specdec.kernels.reference import lowest_argmax
from specdec.loading import Checkpoint, Runtime, load_runtime, open_checkpoint, resolve_backend
from specdec.model.config import Glm4MoeConfig, load_config
from specdec.model.quantization import PUBLISHED
from specdec.model.weights import CheckpointIndex, ignored_names, mtp_prefix
from specdec.step.batch import Extend, build_batch

MIN_SAMPLE_TOKENS, MAX_SAMPLE_TOKENS = 32, 512
SAMPLE_TEXT = '''\
def read_lines(path, encoding="utf-8"):
    """Return the lines of a text file, without their line ends.

    If the file does not exist, an empty list is returned.
    """
    try:
        with open(path, encoding=encoding) as file:
            return [line.rstrip("\\n") for line in file]
    except FileNotFoundError:
        return []


class Counter:
    """Count how often each item occurs."""

    def __init__(self):
        self.counts = {}

    def add(self, item):
        if item not in self.counts:
            self.counts[item] = 0
        self.counts[item] += 1

    def most_common(self, number=None):
        items = sorted(self.counts.items(), key=lambda pair: pair[1], reverse=True)
        if number is None:
            return items
        return items[:number]


The first thing to notice is that the list is not sorted in place. The function returns a new list, and
the original one is left as it was. If you want to change the original list, use the sort method instead.
'''


@dataclass(frozen=True)
class MTPCheck:
    """How often the MTP layer's first draft is the target's own greedy choice, on a sample text."""

    num_positions: int
    """Positions of the text that were compared."""
    acceptance: float
    """Share of them at which the draft is the target's choice."""
    chance: float
    """The same share for drafts assigned to positions at random. An MTP layer whose tensors were lost, or are wired
    wrongly, agrees no more often than that."""

    @property
    def near_chance(self) -> bool:
        """Whether the MTP layer does not work with this target."""
        return self.acceptance < self.chance + 0.05


@dataclass(frozen=True)
class TensorCounts:
    """How many tensors a checkpoint has."""

    target: int
    """Tensors of the target."""
    mtp: int
    """Tensors of the MTP layer."""
    ignored: int
    """Tensors that are not loaded: copies of the target's inside the MTP layer, and the like."""


@dataclass(frozen=True)
class CudaReport:
    """What concerns CUDA: whether its backend can run here, and what a model needs of GPUs."""

    requirements: list[Requirement]
    """What the backend needs, and what of it is here."""
    missing: str
    """What is lacking, in one text; empty where nothing is."""
    paths: dict[str, Paths]
    """The kernels that GPUs get, by their names, the visible GPU last."""
    reserve_bytes: int
    """Bytes of each GPU that `fits` sets aside."""
    fits: list[Fit]
    """On which GPUs the model fits."""
    floors: list[Floor]
    """The least times of decode steps."""


@dataclass(frozen=True)
class Inspection:
    """What `specdec inspect` says of a checkpoint."""

    folder: Path
    """The checkpoint's folder."""
    config: Glm4MoeConfig
    """Its configuration."""
    memory: list[MemoryLine]
    """Memory that it needs, by dtype."""
    tensors: TensorCounts | None
    """How many tensors there are; None where only a config.json was given."""
    mtp_check: MTPCheck | None
    """Whether the MTP layer works; None where that could not be checked."""
    mtp_check_skipped: str | None
    """Why it could not be checked; None where it was."""
    cuda: CudaReport | None
    """The report on CUDA; None unless it was asked for."""

    def as_dict(self) -> dict[str, object]:
        """Returns a document for JSON."""
        config = asdict(self.config)
        config["dtype"] = str(self.config.dtype).removeprefix("torch.")
        return {
            "folder": str(self.folder),
            "config": config,
            "memory": [asdict(line) for line in self.memory],
            "tensors": None if self.tensors is None else asdict(self.tensors),
            "mtp_check": None if self.mtp_check is None else asdict(self.mtp_check),
            "mtp_check_skipped": self.mtp_check_skipped,
            "cuda": None if self.cuda is None else asdict(self.cuda),
        }


def inspect_checkpoint(folder: Path, *, with_cuda: bool = False, progress: Progress = silent) -> Inspection:
    """Inspects a checkpoint. Raises CheckpointError for anything that would keep it from loading.

    folder: the checkpoint's; one with only a config.json will do.
    with_cuda: whether to report on the CUDA backend, too.
    progress: hears of loading and of the check.
    """
    if any(folder.glob("*.safetensors")):
        checkpoint = open_checkpoint(folder)
        index, config = checkpoint.index, checkpoint.config
        is_fp8 = PUBLISHED.covers if config.quantization is None else index.scaled_modules().__contains__
        has_mtp, tensors = index.has_mtp_layer, _count_tensors(index)
        check, skipped = _try_mtp_check(checkpoint, progress)
    else:
        config = load_config(folder)
        is_fp8 = (config.quantization or PUBLISHED).covers
        has_mtp, tensors = config.num_nextn_predict_layers > 0, None
        check, skipped = None, "there are no weights in this folder"
    memory = memory_table(config, has_mtp, is_fp8)
    cuda = report_cuda(config, has_mtp, is_fp8) if with_cuda else None
    return Inspection(folder, config, memory, tensors, check, skipped, cuda)


def _count_tensors(index: CheckpointIndex) -> TensorCounts:
    pattern, prefix = ignored_names(index.config), mtp_prefix(index.config)
    used = [name for name in index.tensors if not pattern.fullmatch(name)]
    mtp = sum(name.startswith(prefix) for name in used)
    return TensorCounts(target=len(used) - mtp, mtp=mtp, ignored=len(index.tensors) - len(used))


def _try_mtp_check(checkpoint: Checkpoint, progress: Progress) -> tuple[MTPCheck | None, str | None]:
    """Loads the weights, which checks every tensor; returns the check of the MTP layer, or why there is none."""
    backend = resolve_backend("cpu", "auto", "auto", checkpoint.config, progress)
    engine_config = EngineConfig(num_pages=-(-MAX_SAMPLE_TOKENS // EngineConfig.page_size))
    try:
        runtime = load_runtime(checkpoint, engine_config, backend, progress=progress)
    except NotEnoughMemoryError as error:
        return None, str(error)
    if runtime.model.mtp is None:
        return None, "the checkpoint has no MTP layer, speculation is unavailable"
    if runtime.max_model_len < MIN_SAMPLE_TOKENS:
        return None, f"a context of {runtime.max_model_len} tokens is too short, {MIN_SAMPLE_TOKENS} are needed"
    progress("checking the MTP layer", 0, 1)
    found = check_mtp(runtime, checkpoint)
    progress("checking the MTP layer", 1, 1)
    return found, None


def report_cuda(config: Glm4MoeConfig, has_mtp: bool, is_fp8: Callable[[str], bool]) -> CudaReport:
    """Returns the report on CUDA. is_fp8: which modules are in FP8 where the checkpoint is."""
    found, visible = requirements(), visible_capability()
    chosen = {name: paths(capability) for name, capability in known_capabilities().items()}
    if visible is not None and visible >= LEAST_CAPABILITY:
        chosen["visible GPU"] = paths(visible)
    fitting = fits(config, has_mtp, is_fp8)
    return CudaReport(
        requirements=found,
        missing=missing(found),
        paths=chosen,
        reserve_bytes=RESERVE_BYTES,
        fits=fitting,
        floors=floors(config, has_mtp, is_fp8, fitting),
    )


@torch.inference_mode()
def teacher_forced(runtime: Runtime, token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Runs target and MTP layer once over a text of n >= 2 tokens, in the pool's first pages, which must be free.

    Returns the target's logits [n, V], row i for token i+1, and the first drafts' [n-1, V], row i for token i+2.
    """
    model, cache = runtime.model, runtime.kv_cache
    assert model.mtp is not None, "there is no MTP layer"
    page_size = cache.shape[3]
    pages = list(range(-(-len(token_ids) // page_size)))
    batch = build_batch([Extend(token_ids, 0, pages)], page_size)
    hidden = model.target(batch.input_ids, batch.metadata, cache)
    pairs = build_batch([Extend(token_ids[1:], 0, pages)], page_size)
    output = model.mtp.draft(hidden[:-1], pairs.input_ids, pairs.metadata, cache[-1])
    return model.target.compute_logits(hidden), model.target.compute_logits(output.normed)


def check_mtp(runtime: Runtime, checkpoint: Checkpoint, text: str = SAMPLE_TEXT) -> MTPCheck:
    """Runs target and MTP layer over `text` once and compares their greedy choices for the same positions."""
    limit = min(runtime.num_pages * runtime.kv_cache.shape[3], runtime.max_model_len)
    target_logits, draft_logits = teacher_forced(runtime, checkpoint.encode(text)[:limit])
    # Pair i predicts token i+2, as the target's row i+1 does.
    choices, drafts = lowest_argmax(target_logits[1:]), lowest_argmax(draft_logits)
    shares = [torch.bincount(x, minlength=checkpoint.config.vocab_size).double() / len(x) for x in (choices, drafts)]
    return MTPCheck(
        num_positions=len(drafts),
        acceptance=(choices == drafts).double().mean().item(),
        chance=(shares[0] @ shares[1]).item(),
    )
