"""Matrix products of the fake device: the same on every CPU, and the same for a row whatever rows are beside it.

torch's own products add in an order that depends on the processor, the threads and the shape. In bf16 that decides
near-ties, and whether two forwards of other shapes agree. These add in float64: what the order leaves there is far
below what a rounding to bf16 or float32 can see.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from support.flashinfer_fakes.device import FakeDevice, launch

ROWS_AT_ONCE = 128  # of a weight in float64: what is larger malloc maps anew each time, which takes longer than to add


def install(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts them in the place of what the backend calls of torch.nn.functional."""
    from specdec.kernels.flashinfer import backend, experts

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype, device=x.device)
        launch(fake, _linear)(x, weight, bias, out)
        return out

    def grouped_mm(x: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
        out = torch.empty(len(x), weights.shape[2], dtype=x.dtype, device=x.device)
        launch(fake, _grouped_linear)(x, weights.transpose(1, 2), offs, out)
        return out

    monkeypatch.setattr(backend, "F", SimpleNamespace(linear=linear))
    monkeypatch.setattr(experts, "F", SimpleNamespace(grouped_mm=grouped_mm))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out] in float64."""
    wide = x.double()
    return torch.cat([wide @ rows.double().T for rows in weight.split(ROWS_AT_ONCE)], -1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    assert x.dtype == weight.dtype
    total = product(x, weight)
    out.copy_(total if bias is None else total + bias)


def _grouped_linear(x: Tensor, weights: Tensor, ends: Tensor, out: Tensor) -> None:
    """weights [E, out, in]; the rows of expert e end before ends[e]."""
    assert x.dtype == weights.dtype == torch.bfloat16
    assert ends.dtype == torch.int32
    start = 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        if end > start:  # an expert in float64 takes longer to make than to multiply with
            out[start:end] = product(x[start:end], weight)
        start = end
    assert start == len(x)
