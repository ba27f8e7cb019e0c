"""Handles drafts that verification finds on the device: places them in the target's tokens, orders them for the rules,
reads them onto the host.

Shapes: B sequences, D of a draft chain, K draft tokens, T packed tokens, R rows that decide, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.decisions import NOT_DRAFTED, Drafts, VerifyBatch
from specdec.kernels.flashinfer.transfer import upload


def place_(tokens: Tensor, batch: VerifyBatch) -> None:
    """Writes drafts that are on the device into their places in tokens [T] int32."""
    drafts = batch.drafts
    if drafts.on_device is None:
        return
    num_steps = drafts.on_device.shape[1]
    places = [
        (first + 1 + i, row * num_steps + i)
        for first, row, count in zip(batch.first_rows, drafts.device_rows, drafts.counts)
        for i in range(count)
    ]
    if places:
        to, source = upload([at for place in zip(*places) for at in place], tokens.device, torch.int64).chunk(2)
        tokens.index_copy_(0, to, drafts.on_device.flatten().index_select(0, source).clamp(min=0).int())


def deciding(hidden: Tensor, batch: VerifyBatch) -> Tensor:
    """Returns the deciding rows [R, H] of hidden states [T, H]: each sequence's first one, and one for each draft."""
    rows = [first + i for first, count in zip(batch.first_rows, batch.drafts.counts) for i in range(count + 1)]
    return hidden.index_select(0, upload(rows, hidden.device))


def in_order(on_device: Tensor, rows: list[int], num: int) -> Tensor:
    """Returns drafts [num, K] in the order of sequences, padded with NOT_DRAFTED.

    on_device: [D, K], see `Drafts.on_device`.
    rows: [B], each sequence's row of it; -1: it has no drafts.
    num: rows of the result, at least B.
    """
    none = torch.full((1, on_device.shape[1]), NOT_DRAFTED, device=on_device.device)
    last = len(on_device)
    places = [last if row < 0 else row for row in rows] + [last] * (num - len(rows))
    return torch.cat([on_device, none]).index_select(0, upload(places, on_device.device))


def on_host(drafts: Drafts, ids: list[int]) -> list[list[int]]:
    """Returns each sequence's drafts, [B]. ids: `drafts.on_device`, read onto the host row by row."""
    if drafts.on_device is None:
        return drafts.token_ids
    starts = [row * drafts.on_device.shape[1] for row in drafts.device_rows]
    return [up_to_end(ids[start : start + count]) for start, count in zip(starts, drafts.counts)]


def up_to_end(ids: list[int]) -> list[int]:
    """Returns one sequence's drafts without their NOT_DRAFTED padding."""
    return ids[: ids.index(NOT_DRAFTED)] if NOT_DRAFTED in ids else ids
