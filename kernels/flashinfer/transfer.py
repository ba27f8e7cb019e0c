"""From the host to the device without waiting for the device, which pageable memory would."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pinned(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """In page-locked memory, which torch does not use again before copies from it are done."""
    return torch.tensor(values, dtype=dtype, pin_memory=True)


def upload(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    return pinned(values, dtype).to(device, non_blocking=True)
