"""Which backend is chosen, and what is said where it cannot run."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdec.errors import KernelsUnavailableError, SpecdecWarning
from specdec.kernels import AnyBackend, select
from specdec.kernels.flashinfer import requirements
from specdec.loading import resolve_backend, resolve_device
from support.fakes import NEEDS_COMPILER

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG: Any = SimpleNamespace(dtype=torch.bfloat16, quantization=None)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with everything that the backend needs, and the backend itself replaced."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(requirements, "missing", lambda: "")
    stand_in = SimpleNamespace(on=lambda device: SimpleNamespace(name="flashinfer", device=device))
    module = SimpleNamespace(FlashInferKernels=stand_in)
    monkeypatch.setitem(sys.modules, "specdec.kernels.flashinfer.backend", module)


def chosen(*arguments: object) -> tuple[str, str]:
    kernels: AnyBackend = select(*arguments)  # type: ignore[arg-type]
    return kernels.name, kernels.device.type


def test_a_gpu_that_has_everything_gets_flashinfer(cuda: None) -> None:
    assert resolve_device("auto") == CUDA
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert chosen(CUDA, None) == ("flashinfer", "cuda")
    assert chosen(CUDA, torch.bfloat16, "auto") == ("flashinfer", "cuda")
    assert chosen(CUDA, None, "flashinfer") == ("flashinfer", "cuda")
    assert chosen(CUDA, torch.float32) == ("reference", "cuda")  # FlashInfer has no attention in fp32
    assert chosen(CUDA, None, "reference") == ("reference", "cuda")
    assert resolve_backend("auto", "auto", "reference", CONFIG).device == CUDA


def test_what_was_asked_for_is_never_replaced(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"dtype = torch\.float32: kernels = 'flashinfer' compute in bfloat16 only"):
        select(CUDA, torch.float32, "flashinfer")
    with pytest.raises(KernelsUnavailableError, match="kernels = 'flashinfer' run on CUDA, not on device = 'cpu'"):
        select(CPU, None, "flashinfer")
    with pytest.raises(KernelsUnavailableError, match="kernels = 'cpu' run on the CPU, not on device = 'cuda'"):
        select(CUDA, None, "cpu")
    monkeypatch.setattr(requirements, "missing", lambda: "no nvcc")
    with pytest.raises(KernelsUnavailableError, match="kernels = 'flashinfer' cannot run here: no nvcc"):
        select(CUDA, None, "flashinfer")
    with pytest.warns(
        SpecdecWarning, match="using the slow reference kernels: kernels = 'flashinfer' cannot run here: no nvcc"
    ):
        assert chosen(CUDA, None) == ("reference", "cuda")


@NEEDS_COMPILER
def test_kernels_for_the_cpu_choose_the_device(cuda: None) -> None:
    assert resolve_backend("auto", "auto", "cpu", CONFIG).device == CPU
    with pytest.raises(KernelsUnavailableError):
        resolve_backend("cuda", "auto", "cpu", CONFIG)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu() -> None:
    assert resolve_device("auto") == CPU
    for arguments in (("cuda", "auto", "auto"), ("cuda", "auto", "flashinfer"), ("auto", "auto", "flashinfer")):
        with pytest.raises(KernelsUnavailableError, match="install a CUDA build of torch"):
            resolve_backend(*arguments, CONFIG)
