"""The least time of a decode step on a GPU, from a model's config alone: what it reads, over the memory's bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from specdec.inspection.memory import GPUS, NOTHING, Fit
from specdec.inspection.step_bytes import ModelBytes
from specdec.kernels.flashinfer.requirements import fp8_kinds
from specdec.kernels.fp8 import Fp8Kind, Fp8Matrix
from specdec.kernels.reference import ReferenceKernels
from specdec.model.config import Glm4MoeConfig
from specdec.model.fp8 import store_fp8
from specdec.model.weights import build_model, prepare

DRAFT_LENGTHS = range(6)


@dataclass(frozen=True)
class Floor:
    """The least time of one decode step for one sequence, by number of draft tokens from 0 on.

    `ModelBytes.step` says what a step reads. Keys and values are left out, whatever the context.
    """

    gpu: str
    """The GPU's name."""
    gpu_bytes_per_s: float
    """Memory bandwidth of one GPU, bytes per second."""
    num_gpus: int | None
    """The fewest GPUs that hold the weights, each of which reads an equal share; None where the largest number in
    `specdec.inspection.memory.NUM_GPUS` does not."""
    checkpoint: str
    """Weights of the checkpoint, "bfloat16" or "fp8"."""
    step_bytes: list[float]
    """Bytes that all GPUs together read in a step, with the weights as their kernels hold them, by K."""
    step_s: list[float] | None
    """Seconds of a step, by K; None where `num_gpus` is."""


def floors(config: Glm4MoeConfig, has_mtp: bool, is_fp8: Callable[[str], bool], fits: list[Fit]) -> list[Floor]:
    """Returns the floors of every GPU and checkpoint. Without an MTP layer there is K = 0 alone.

    config: the model's.
    has_mtp: whether it has an MTP layer.
    is_fp8: which modules are in FP8 where the checkpoint is.
    fits: of the same model, see `specdec.inspection.memory.fits`.
    """
    read = cache(lambda kinds: _step_bytes(config, has_mtp, is_fp8, kinds))
    found = []
    for gpu in GPUS:
        for checkpoint, kinds in (("bfloat16", NOTHING), ("fp8", fp8_kinds(gpu.capability))):
            num_gpus, step_bytes = _fewest(fits, gpu.name, checkpoint), read(kinds)
            step_s = None if num_gpus is None else [size / (num_gpus * gpu.bytes_per_s) for size in step_bytes]
            found.append(Floor(gpu.name, gpu.bytes_per_s, num_gpus, checkpoint, step_bytes, step_s))
    return found


def _fewest(fits: list[Fit], gpu: str, checkpoint: str) -> int | None:
    held = (fit for fit in fits if fit.kv_tokens is not None)
    return min((fit.num_gpus for fit in held if (fit.gpu, fit.checkpoint) == (gpu, checkpoint)), default=None)


def _step_bytes(
    config: Glm4MoeConfig, has_mtp: bool, is_fp8: Callable[[str], bool], kinds: frozenset[Fp8Kind]
) -> list[float]:
    """Returns the bytes that a step reads, by K, counted on a model without memory. Weights are in bfloat16, apart from
    those `kinds` of matrices that stay in FP8."""
    kernels = _AsStored(torch.device("meta"), torch.bfloat16)
    model = build_model(config, kernels, with_mtp=has_mtp)
    store_fp8(model.parts(), is_fp8, kinds)
    prepare(model, kernels, config.max_position_embeddings)
    sizes = ModelBytes.of(model)
    return [sizes.step(k) for k in (DRAFT_LENGTHS if has_mtp else DRAFT_LENGTHS[:1])]


class _AsStored(ReferenceKernels):
    """Keeps matrices as they are handed over, those in FP8 too, as the kernels of a GPU do."""

    def pack(self, weight: Tensor | Fp8Matrix, *, full_precision: bool = False) -> Any:
        return weight

    def pack_gate_up(self, weight: Tensor | Fp8Matrix) -> Any:
        return weight
