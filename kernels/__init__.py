"""Backends for the heavy operations, chosen once at start-up.

`reference` is plain torch and runs anywhere; `cpu` is C++ for the CPU; `flashinfer` is for CUDA.
"""

from __future__ import annotations

import torch

from specdec.errors import KernelsUnavailableError, warn
from specdec.kernels.interface import AttentionMetadata, DecoderOutput, Kernels, RoutingConfig
from specdec.kernels.reference import ReferenceKernels

__all__ = [
    "AttentionMetadata",
    "DecoderOutput",
    "Kernels",
    "KernelsUnavailableError",
    "RoutingConfig",
    "check_name",
    "select",
]

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
) -> Kernels:
    """The backend for `device` with matrices in `dtype`; `requested` is one of `BACKENDS`.

    dtype None leaves it to the backend: float32; bfloat16 on CUDA, and where it computes in float32 all the same and
    the checkpoint has no more. "auto" is the C++ backend on a CPU with a compiler, FlashInfer in bfloat16 on CUDA, else
    the reference, with a SpecdecWarning. What was asked for by name is used or refused, never replaced. int8 quantises
    the checkpoint's matrices as they are loaded, for the C++ backend only.

    Raises ValueError for an unknown name or a dtype that the backend does not store,
    KernelsUnavailableError where it cannot run.
    """
    check_name(requested)
    fits = dtype in (None, torch.bfloat16) if device.type == "cuda" else _fits_cpu(device, dtype)
    fast = {"cpu": "cpu", "cuda": "flashinfer"}.get(device.type)
    chosen = fast if requested == "auto" and fits else requested
    try:
        if chosen == "cpu":
            return _cpu_kernels(device, dtype, checkpoint_dtype)
        if chosen == "flashinfer":
            return _flashinfer_kernels(device, dtype)
    except KernelsUnavailableError as error:
        if requested != "auto" or dtype == torch.int8:
            raise
        warn(f"using the slow reference kernels: {error}")
    if dtype == torch.int8:
        raise ValueError("dtype = int8 needs kernels = 'cpu': the reference kernels do not quantise")
    return ReferenceKernels(device, torch.float32 if dtype is None else dtype)


def _fits_cpu(device: torch.device, dtype: torch.dtype | None) -> bool:
    return device.type == "cpu" and dtype in (None, torch.float32, torch.bfloat16, torch.int8)


def _cpu_kernels(device: torch.device, dtype: torch.dtype | None, checkpoint_dtype: torch.dtype) -> Kernels:
    if device.type != "cpu":
        raise KernelsUnavailableError(f"kernels = 'cpu' run on the CPU, not on device = {str(device)!r}")
    from specdec.kernels.cpu import CpuKernels

    stored = torch.bfloat16 if checkpoint_dtype == torch.bfloat16 else torch.float32
    return CpuKernels(stored if dtype is None else dtype, load_dtype=stored)


def _flashinfer_kernels(device: torch.device, dtype: torch.dtype | None) -> Kernels:
    from specdec.kernels.flashinfer.requirements import missing

    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype = {dtype}: kernels = 'flashinfer' compute in bfloat16 only")
    if why := missing():
        raise KernelsUnavailableError(f"kernels = 'flashinfer' cannot run here: {why}")
    if device.type != "cuda":
        raise KernelsUnavailableError(f"kernels = 'flashinfer' run on CUDA, not on device = {str(device)!r}")
    from specdec.kernels.flashinfer.backend import FlashInferKernels

    return FlashInferKernels.on(device)
