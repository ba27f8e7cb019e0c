"""Copies from the host to the device without a wait for the device, which pageable memory would bring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pinned(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """Returns the values [n] in page-locked memory, which torch does not use again before copies from it are done."""
    return torch.tensor(values, dtype=dtype, pin_memory=True)


def upload(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Returns the values [n] on the device; the copy is queued, not waited for."""
    return pinned(values, dtype).to(device, non_blocking=True)
