"""Our Triton kernels on the fake device: in the interpreter, where reading their arguments makes nobody wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes

from support import triton_interpreter
from support.flashinfer_fakes.device import FakeDevice


def install(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime.interpreter import InterpretedFunction

    plain = InterpretedFunction.run

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        assert fake.capturing is None, f"{kernel.__name__} in a capture"
        fake.launches.append(kernel.__name__)
        with torch._C.DisableTorchFunctionSubclass(), _disable_current_modes():
            plain(kernel, *args, **kwargs)

    triton_interpreter.hasten(monkeypatch)
    monkeypatch.setattr(InterpretedFunction, "run", run)
