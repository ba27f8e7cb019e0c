"""FlashInfer's own Python over kernels in plain torch, on a CPU that passes for a CUDA device.

`install` replaces what FlashInfer compiles (`kernels`) and what torch.cuda offers (`device`, `graphs`), and binds every
call to the signatures of 0.7.2.post1 that are committed here (`signatures`). The fakes check what the kernels do not.
"""

from __future__ import annotations

import pytest

from flashinfer_fakes import device, graphs, kernels, signatures
from flashinfer_fakes.device import FakeDevice

__all__ = ["FakeDevice", "install"]


def install(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    device.install(fake, monkeypatch)
    graphs.install(fake, monkeypatch)
    kernels.install(fake, monkeypatch)
    signatures.install(monkeypatch)
    return fake
