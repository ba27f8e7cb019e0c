"""Triton's kernels, on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

import triton

from specdec.kernels.triton import TritonSampling
from support import triton_interpreter


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")


@pytest.fixture
def kernels(device: torch.device) -> TritonSampling:
    kernels = TritonSampling()
    kernels.device = device
    return kernels


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        triton_interpreter.hasten(patch)
        yield
