"""Backends for the heavy operations, chosen once at start-up.

`reference` is plain torch and runs anywhere; `cpu` is C++ for the CPU; `flashinfer` is for CUDA.
"""

from __future__ import annotations

import logging

import torch

from specdec.errors import KernelsUnavailableError, warn
from specdec.kernels.backend import AnyBackend
from specdec.kernels.data import AttentionMetadata, DecoderOutput, RoutingConfig
from specdec.kernels.progress import Progress, silent
from specdec.kernels.reference import ReferenceKernels

__all__ = [
    "AnyBackend",
    "AttentionMetadata",
    "DecoderOutput",
    "KernelsUnavailableError",
    "RoutingConfig",
    "check_name",
    "select",
]

log = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "cpu", "flashinfer")


def check_name(requested: str) -> None:
    """Raises ValueError unless `requested` is one of `BACKENDS`."""
    if requested not in BACKENDS:
        raise ValueError(f"kernels = {requested!r} is unknown: choose one of {', '.join(BACKENDS)}")


def select(
    device: torch.device,
    dtype: torch.dtype | None,
    requested: str = "auto",
    checkpoint_dtype: torch.dtype = torch.float32,
    *,
    progress: Progress = silent,
) -> AnyBackend:
    """Returns the backend for a device.

    device: where it computes.
    dtype: of matrices. None leaves it to the backend: float32; bfloat16 on CUDA, and where it computes in float32 all
        the same and the checkpoint has no more. int8 quantises the checkpoint's matrices as they are loaded, for the
        C++ backend only.
    requested: one of `BACKENDS`. "auto" is the C++ backend on a CPU with a compiler, FlashInfer in bfloat16 on CUDA,
        else the reference, with a SpecdecWarning. What is asked for by name is used or refused, never replaced.
    checkpoint_dtype: of the checkpoint's tensors.
    progress: hears of a compilation.

    Raises ValueError for an unknown name or a dtype that the backend does not store, KernelsUnavailableError where it
    cannot run.
    """
    check_name(requested)
    chosen = _fast(device, dtype) if requested == "auto" else requested
    try:
        if chosen == "cpu":
            return _cpu_kernels(device, dtype, checkpoint_dtype, progress)
        if chosen == "flashinfer":
            return _flashinfer_kernels(device, dtype)
    except KernelsUnavailableError as error:
        if requested != "auto" or dtype == torch.int8:
            raise
        log.info("auto: not %s because %s", chosen, error)
        warn(f"using the slow reference kernels: {error}")
    if dtype == torch.int8:
        raise ValueError("dtype = int8 needs kernels = 'cpu': the reference kernels do not quantise")
    return ReferenceKernels(device, torch.float32 if dtype is None else dtype)


_FAST: dict[str, tuple[str, tuple[torch.dtype | None, ...]]] = {
    "cpu": ("cpu", (None, torch.float32, torch.bfloat16, torch.int8)),
    "cuda": ("flashinfer", (None, torch.bfloat16)),
}


def _fast(device: torch.device, dtype: torch.dtype | None) -> str:
    """Returns the name of the device's own backend where it stores `dtype`, else "reference"."""
    name, dtypes = _FAST.get(device.type, ("reference", (dtype,)))
    if dtype in dtypes:
        return name
    log.info("auto: not %s because it does not store %s", name, dtype)
    return "reference"


def _cpu_kernels(
    device: torch.device, dtype: torch.dtype | None, checkpoint_dtype: torch.dtype, progress: Progress
) -> AnyBackend:
    if device.type != "cpu":
        raise KernelsUnavailableError(f"kernels = 'cpu' run on the CPU, not on device = {str(device)!r}")
    from specdec.kernels.cpu import CpuKernels

    stored = torch.bfloat16 if checkpoint_dtype == torch.bfloat16 else torch.float32
    return CpuKernels(stored if dtype is None else dtype, load_dtype=stored, progress=progress)


def _flashinfer_kernels(device: torch.device, dtype: torch.dtype | None) -> AnyBackend:
    from specdec.kernels.flashinfer.requirements import missing

    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype = {dtype}: kernels = 'flashinfer' compute in bfloat16 only")
    if why := missing():
        raise KernelsUnavailableError(f"kernels = 'flashinfer' cannot run here: {why}")
    if device.type != "cuda":
        raise KernelsUnavailableError(f"kernels = 'flashinfer' run on CUDA, not on device = {str(device)!r}")
    from specdec.kernels.flashinfer.backend import FlashInferKernels

    return FlashInferKernels.on(device)
