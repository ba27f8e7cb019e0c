"""A CPU that passes for a CUDA device: it notices when the host waits for it.

Whatever is made with a torch.device, and all that is computed from it, is an `OnDevice` tensor. Reading its numbers is
waiting, and so is copying to it from memory that is not pinned. (FlashInfer says "cpu" where it means the host.)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

CPU = torch.device("cpu")
UPLOADING = (
    "argmax",
    "backend",
    "chain",
    "drafts",
    "graphs",
    "planner",
    "sampled",
)  # modules of specdec.kernels.flashinfer that import `upload`


@dataclass
class FakeDevice:
    """waits: where the host waited. clock: counts plans and events. done: plans before it have surely been copied."""

    waits: list[str] = field(default_factory=list)
    clock: int = 0
    done: int = 0
    capturing: Any = None
    launches: list[str] = field(default_factory=list)

    def wait(self, what: str) -> None:
        assert self.capturing is None, f"{what} in a capture"
        frame = sys._getframe(1)
        while frame.f_back is not None and "specdec" not in str(frame.f_globals.get("__name__")):
            frame = frame.f_back
        self.waits.append(f"{what} in {frame.f_code.co_name}")
        self.done = self.clock

    @contextmanager
    def waiting(self) -> Iterator[list[str]]:
        """Where the host waits while this is entered."""
        before = self.waits
        self.waits = found = []
        try:
            yield found
        finally:
            self.waits = before + found


_READING = {
    getattr(Tensor, name)
    for name in (
        "item", "tolist", "cpu", "numpy", "nonzero", "unique", "equal", "allclose", "__bool__", "__int__", "__float__",
        "__index__", "__contains__", "masked_select", "bincount",
    )
} | {
    torch.nonzero, torch.unique, torch.equal, torch.allclose, torch.masked_select, torch.bincount, torch.is_nonzero,
    torch.repeat_interleave,
}  # fmt: skip

_INEXACT = {Tensor.sigmoid, Tensor.sum}  # Computed in float64, so that a CPU's own way to round is not seen.


class OnDevice(Tensor):
    device_of_all: FakeDevice

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READING or (func is Tensor.to and "cpu" in args) or _indexes_from_host(func, args):
            cls.device_of_all.wait(getattr(func, "__name__", str(func)))
        if func is Tensor.tolist:  # its own recursion would count once more for each row
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].tolist()
        if func in _INEXACT and args[0].dtype in (torch.float32, torch.bfloat16):
            return func(args[0].double(), *args[1:], **(kwargs or {})).to(args[0].dtype)
        return super().__torch_function__(func, types, args, kwargs or {})


def _indexes_from_host(func: Any, args: tuple[Any, ...]) -> bool:
    """x[[1, 2]] copies its index from pageable memory, x[mask] counts what is set."""
    if func not in (Tensor.__getitem__, Tensor.__setitem__):
        return False
    parts = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(p, list) or (isinstance(p, Tensor) and p.dtype == torch.bool) for p in parts)


def on_device(x: Tensor) -> Tensor:
    return x.as_subclass(OnDevice)


def launch(fake: FakeDevice, kernel: Callable[..., None]) -> Callable[..., None]:
    """A kernel as the device runs it: reading its inputs makes nobody wait, and a capture records it as one call."""

    @functools.wraps(kernel)
    def launched(*args: Any) -> None:
        def run() -> None:
            with torch._C.DisableTorchFunctionSubclass(), _disable_current_modes():
                kernel(*args)

        fake.launches.append(kernel.__name__)
        if fake.capturing is not None:
            fake.capturing.uses(args)
            fake.capturing.calls.append(run)
        run()

    return launched


def install(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    OnDevice.device_of_all = fake
    for name in ("empty", "zeros", "zeros_like", "full", "arange", "tensor"):
        monkeypatch.setattr(torch, name, _making(fake, getattr(torch, name)))
    monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(fake))
    import specdec.kernels.flashinfer.backend  # all of its modules, before what they import is replaced
    from specdec.kernels.flashinfer import transfer

    plain = transfer.upload
    for module in UPLOADING:
        monkeypatch.setattr(
            getattr(specdec.kernels.flashinfer, module), "upload", lambda *args: on_device(plain(*args))
        )


def _making(fake: FakeDevice, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if not isinstance(kwargs.get("device"), torch.device) or tensor.is_meta:
            return tensor
        if make.__name__ == "tensor":
            fake.wait("a copy from pageable memory")
        return on_device(tensor)

    return made


class FakeEvent:
    def __init__(self, fake: FakeDevice) -> None:
        self._fake, self._at = fake, 0

    def record(self) -> None:
        self._fake.clock += 1
        self._at = self._fake.clock

    def synchronize(self) -> None:
        if self._at > self._fake.done:
            self._fake.wait("an event")
