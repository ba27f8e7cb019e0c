"""FlashInfer's own Python over kernels in plain torch, on a CPU that passes for a CUDA device.

`install` replaces what FlashInfer compiles (`kernels`) and what torch.cuda offers (`device`, `graphs`), lets our Triton
kernels be interpreted (`triton_kernels`), and binds every call to the signatures of 0.7.2.post1 that are committed here
(`signatures`). The fakes check what the kernels do not.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

from specdec import Engine
from specdec.kernels import speculation
from specdec.kernels.flashinfer.backend import FlashInferKernels
from specdec.kernels.flashinfer.experts import Experts, FusedExperts
from specdec.kernels.reference import ReferenceKernels
from support.flashinfer_fakes import device, graphs, kernels, products, signatures, triton_kernels
from support.flashinfer_fakes.device import CPU, FakeDevice

__all__ = ["FakeDevice", "break_norm", "decide_on_the_host", "engine", "install"]

OPERATIONS = "edit_", "truncate_", "choose", "softmax", "residual_mass", "sample_residual", "uniforms"


def install(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    device.install(fake, monkeypatch)
    graphs.install(fake, monkeypatch)
    kernels.install(fake, monkeypatch)
    products.install(fake, monkeypatch)
    signatures.install(monkeypatch)
    triton_kernels.install(fake, monkeypatch)
    return fake


def engine(monkeypatch: pytest.MonkeyPatch, model: str | Path, experts: Experts | None = None, **config: Any) -> Engine:
    """An engine on the fake device, which is installed."""
    kernels = FlashInferKernels(CPU, experts or FusedExperts())
    with monkeypatch.context() as patch:
        patch.setattr("specdec.engine.engine.resolve_backend", lambda *_: kernels)
        return Engine.from_pretrained(model, **config)


def break_norm(engine: Engine, of: str) -> str:
    """Weights that are NaN, of the "mtp" layer or the "target". -> what the engine says."""
    model = engine.runtime.model
    assert model.mtp is not None
    norm = model.mtp.shared_head.norm if of == "mtp" else model.target.model.norm
    norm.weight.data.fill_(float("nan"))
    return "the MTP layer's logits are not finite" if of == "mtp" else "the target's logits are not finite"


def decide_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same forwards, but drafts and decisions of the composed path over the reference's operations."""
    monkeypatch.setattr(FlashInferKernels, "draft_chain", speculation.draft_chain)
    monkeypatch.setattr(FlashInferKernels, "verify", speculation.verify)
    for name in OPERATIONS:
        monkeypatch.setattr(FlashInferKernels, name, getattr(ReferenceKernels, name))
