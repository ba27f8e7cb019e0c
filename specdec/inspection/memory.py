"""Computes how much memory a model needs, from its config alone, and on which GPUs that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from specdec.cache.pages import page_bytes
from specdec.kernels import select
from specdec.kernels.flashinfer.requirements import Capability, fp8_kinds
from specdec.kernels.fp8 import FP8_KINDS, Fp8Kind
from specdec.loading import GIB, weight_bytes
from specdec.model.config import Glm4MoeConfig

MIB = 2**20


@dataclass(frozen=True)
class MemoryLine:
    """Memory that a model needs in one dtype."""

    dtype: str
    """Dtype of the weights: "bfloat16", "float32" or "fp8"."""
    weight_bytes: int
    """Bytes of all weights."""
    mtp_weight_bytes: int
    """Bytes of the MTP layer's weights among them."""
    kv_bytes_per_token: int
    """Bytes of the KV cache per token, in the same dtype; in bfloat16 where the weights are in FP8."""


@dataclass(frozen=True)
class GPU:
    """A kind of GPU."""

    name: str
    """Its name."""
    capability: Capability
    """Its compute capability."""
    memory_bytes: int
    """Bytes of its memory."""
    bytes_per_s: float
    """Bandwidth of its memory, bytes per second."""


# Total memory as nvidia-smi prints it, in MiB; what is sold as 80 or 141 GB differs from it either way. A100 and H100:
# https://github.com/modal-labs/modal-client/pull/2797. B200, which can use 180 of its 192 GB:
# https://github.com/NVIDIA/TensorRT-LLM/issues/10278. RTX 4090 and H200: logs in many public repositories.
# Bandwidths as NVIDIA's data sheets print them, of the SXM modules where there are several: RTX 4090 1,008 GB/s (white
# paper of the Ada architecture), A100 80GB 2,039 GB/s, H100 3.35 TB/s, H200 4.8 TB/s, DGX B200 64 TB/s for eight. By
# bus width and clock a B200 has 7.67 TB/s (https://github.com/pytorch/ao/pull/4002).
GPUS = (
    GPU("RTX 4090", (8, 9), 24564 * MIB, 1008e9),
    GPU("A100 80GB", (8, 0), 81920 * MIB, 2039e9),
    GPU("H100", (9, 0), 81559 * MIB, 3350e9),
    GPU("H200", (9, 0), 143771 * MIB, 4800e9),
    GPU("B200", (10, 0), 183359 * MIB, 8000e9),
)
NUM_GPUS = (1, 2, 4, 8)
# Bytes of each GPU that are set aside for what is neither weights nor cache. An estimate: CUDA's context 0.5 GiB,
# workspaces of attention and experts 0.5, CUDA graphs 1, activations of 8,192 rows and logits of 256 rows in fp32, a
# few copies of each, 2.
RESERVE_BYTES = 4 * GIB
NOTHING: frozenset[Fp8Kind] = frozenset()


@dataclass(frozen=True)
class Fit:
    """Whether a model fits on a number of GPUs of one kind, and with how much cache."""

    gpu: str
    """The GPU's name."""
    gpu_memory_bytes: int
    """Bytes of memory of one GPU."""
    num_gpus: int
    """How many there are."""
    checkpoint: str
    """Weights of the checkpoint, "bfloat16" or "fp8"."""
    weight_bytes: int
    """Bytes of the weights as the GPU's kernels hold them, which may have to dequantise FP8."""
    kv_tokens: int | None
    """Tokens that the KV cache has room for, weights and cache split evenly over the GPUs; None where not even the
    weights fit."""


def memory_table(config: Glm4MoeConfig, has_mtp: bool, is_fp8: Callable[[str], bool]) -> list[MemoryLine]:
    """Returns the memory that a model needs in each dtype. is_fp8: which modules are in FP8 where the checkpoint is."""
    lines = []
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32), ("fp8", torch.bfloat16)):
        kinds = FP8_KINDS if name == "fp8" else NOTHING
        target, total = (_weight_bytes(config, with_mtp, is_fp8, kinds, dtype) for with_mtp in (False, has_mtp))
        lines.append(MemoryLine(name, total, total - target, _kv_bytes(config, has_mtp, dtype)))
    return lines


def fits(config: Glm4MoeConfig, has_mtp: bool, is_fp8: Callable[[str], bool]) -> list[Fit]:
    """Returns whether a model fits, for each GPU, checkpoint and number of GPUs, in this order. is_fp8: which modules
    are in FP8 where the checkpoint is."""
    held = cache(lambda kinds: _weight_bytes(config, has_mtp, is_fp8, kinds, torch.bfloat16))
    kv_bytes = _kv_bytes(config, has_mtp, torch.bfloat16)
    found = []
    for gpu in GPUS:
        for checkpoint, kinds in (("bfloat16", NOTHING), ("fp8", fp8_kinds(gpu.capability))):
            for num_gpus in NUM_GPUS:
                left = num_gpus * (gpu.memory_bytes - RESERVE_BYTES) - held(kinds)
                tokens = None if left < 0 else left // kv_bytes
                found.append(Fit(gpu.name, gpu.memory_bytes, num_gpus, checkpoint, held(kinds), tokens))
    return found


def _weight_bytes(
    config: Glm4MoeConfig,
    with_mtp: bool,
    is_fp8: Callable[[str], bool],
    kinds: frozenset[Fp8Kind],
    dtype: torch.dtype,
) -> int:
    return weight_bytes(config, select(torch.device("meta"), dtype, "reference"), with_mtp, is_fp8, kinds)


def _kv_bytes(config: Glm4MoeConfig, has_mtp: bool, dtype: torch.dtype) -> int:
    """Returns the bytes of one token in the KV cache."""
    return page_bytes(config, config.num_hidden_layers + has_mtp, 1, dtype)


def known_capabilities() -> dict[str, Capability]:
    """Returns each compute capability, oldest first, by the names of the GPUs that have it."""
    names: dict[Capability, list[str]] = {}
    for gpu in sorted(GPUS, key=lambda gpu: gpu.capability):
        names.setdefault(gpu.capability, []).append(gpu.name)
    return {", ".join(of): capability for capability, of in names.items()}
