"""Decisions at temperature 0, without edits: argmaxes on the device, and one reading of them at a step's end.

What `sampled` would do, too, but with no batch to pack and no kernels to compile.

Shapes: B sequences, of which b still draft; K draft tokens, R rows that decide, T packed tokens, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.kernels import rules
from specdec.kernels.flashinfer.drafts import deciding, on_host
from specdec.kernels.flashinfer.transfer import upload
from specdec.kernels.interface import (
    EXACT_MATCH,
    GREEDY,
    NOT_DRAFTED,
    NOT_FINITE,
    DraftChain,
    Verification,
    Verified,
)

if TYPE_CHECKING:
    from specdec.kernels.flashinfer.backend import FlashInferKernels


class ArgmaxDraws:
    """See `specdec.kernels.flashinfer.chain.Draws`; for chains without sampling."""

    def __init__(self, kernels: FlashInferKernels, head: Tensor, chain: DraftChain) -> None:
        self._kernels, self._head = kernels, head
        shape = len(chain.counts), max(chain.counts)
        self.ids = torch.full(shape, NOT_DRAFTED, device=kernels.device)  # [B, K]

    def draw(self, normed: Tensor, step: int, active: list[int]) -> None:
        best = self._kernels.head_argmax(normed, self._head)  # [b]
        sequences = upload(active, self._kernels.device, torch.int64)
        self.ids[:, step].index_copy_(0, sequences, torch.where(best < 0, NOT_FINITE, best))


def decides(v: Verification) -> bool:
    """Whether the argmax of each row is all that is asked for."""
    return not (
        v.keep_logits
        or any(v.edits)
        or any(rule != EXACT_MATCH for rule in v.rules)
        or any(stream != GREEDY for stream in v.rows.streams)
    )


def decide(kernels: FlashInferKernels, head: Tensor, hidden: Tensor, v: Verification) -> Verified:
    """What follows the target's hidden states [T, H]. Choices and drafts are read together."""
    choices = kernels.head_argmax(deciding(hidden, v), head)  # [R]
    drafts = choices.new_empty(0) if v.drafts_on_device is None else v.drafts_on_device.flatten()
    numbers = torch.cat([choices, drafts]).tolist()
    known = on_host(v, numbers[len(choices) :])
    each = iter(numbers)
    token_ids = [rules.match_choices([next(each) for _ in range(len(row) + 1)], d) for row, d in zip(v.drafts, known)]
    return Verified(hidden, token_ids, None, None, known)
