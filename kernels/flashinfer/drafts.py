"""Drafts that verification finds on the device: into the target's tokens, and onto the host.

Shapes: B sequences, K draft tokens, T packed tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specdec.kernels.flashinfer.transfer import upload
from specdec.kernels.interface import Verification


def place_(tokens: Tensor, v: Verification) -> None:
    """Into their rows of tokens [T] int32."""
    if v.drafts_on_device is None:
        return
    num_steps = v.drafts_on_device.shape[1]
    places = [
        (first + 1 + i, row * num_steps + i)
        for first, row, drafts in zip(v.first_rows, v.draft_rows, v.drafts)
        for i in range(len(drafts))
    ]
    if places:
        to, source = upload([at for place in zip(*places) for at in place], tokens.device, torch.int64).chunk(2)
        tokens.index_copy_(0, to, v.drafts_on_device.flatten().index_select(0, source).clamp(min=0).int())


def on_host(v: Verification, ids: list[int]) -> list[list[int]]:
    """Of each sequence [B], out of what was on the device, row by row."""
    if v.drafts_on_device is None:
        return v.drafts
    starts = [row * v.drafts_on_device.shape[1] for row in v.draft_rows]
    return [ids[start : start + len(drafts)] for start, drafts in zip(starts, v.drafts)]


def read(v: Verification) -> Verification:
    """The same with its drafts on the host; waits for the device."""
    if v.drafts_on_device is None:
        return v
    return replace(v, drafts=on_host(v, v.drafts_on_device.flatten().tolist()), drafts_on_device=None)
