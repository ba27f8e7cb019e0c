"""Drafts that verification finds on the device: into the target's tokens, before the rules, and onto the host.

Shapes: B sequences, D of a draft chain, K draft tokens, T packed tokens, R rows that decide, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.flashinfer.transfer import upload
from specdec.kernels.interface import NOT_DRAFTED, Verification


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


def deciding(hidden: Tensor, v: Verification) -> Tensor:
    """Of [T, H] the rows [R, H] that decide: each sequence's first one, and one for each of its drafts."""
    rows = [first + i for first, drafts in zip(v.first_rows, v.drafts) for i in range(len(drafts) + 1)]
    return hidden.index_select(0, upload(rows, hidden.device))


def in_order(on_device: Tensor, rows: list[int], num: int) -> Tensor:
    """Drafts [D, K] -> [num, K]: of each sequence those in its row, NOT_DRAFTED where that is -1 and beyond them."""
    none = torch.full((1, on_device.shape[1]), NOT_DRAFTED, device=on_device.device)
    last = len(on_device)
    places = [last if row < 0 else row for row in rows] + [last] * (num - len(rows))
    return torch.cat([on_device, none]).index_select(0, upload(places, on_device.device))


def on_host(v: Verification, ids: list[int]) -> list[list[int]]:
    """Of each sequence [B], out of what was on the device, row by row."""
    if v.drafts_on_device is None:
        return v.drafts
    starts = [row * v.drafts_on_device.shape[1] for row in v.draft_rows]
    return [up_to_end(ids[start : start + len(drafts)]) for start, drafts in zip(starts, v.drafts)]


def up_to_end(ids: list[int]) -> list[int]:
    """Of one sequence's padded drafts those that there are."""
    return ids[: ids.index(NOT_DRAFTED)] if NOT_DRAFTED in ids else ids
