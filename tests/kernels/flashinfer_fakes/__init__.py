"""FlashInfer's own Python over kernels in plain torch, on a CPU that passes for a CUDA device.

`install` replaces what FlashInfer compiles (`kernels`) and what torch.cuda offers (`device`, `graphs`), and binds every
call to the signatures of 0.7.2.post1 that are committed here (`signatures`). The fakes check what the kernels do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashinfer_fakes import device, graphs, kernels, signatures
from flashinfer_fakes.device import CPU, FakeDevice
from specdec import Engine
from specdec.kernels.flashinfer.backend import FlashInferKernels
from specdec.kernels.flashinfer.experts import Experts, FusedExperts

__all__ = ["FakeDevice", "engine", "install"]


def install(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    device.install(fake, monkeypatch)
    graphs.install(fake, monkeypatch)
    kernels.install(fake, monkeypatch)
    signatures.install(monkeypatch)
    return fake


def engine(monkeypatch: pytest.MonkeyPatch, model: str | Path, experts: Experts | None = None, **config: Any) -> Engine:
    """An engine on the fake device, which is installed."""
    kernels = FlashInferKernels(CPU, experts or FusedExperts())
    with monkeypatch.context() as patch:
        patch.setattr("specdec.engine.resolve_backend", lambda *_: kernels)
        return Engine.from_pretrained(model, **config)
