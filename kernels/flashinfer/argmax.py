"""Decisions at temperature 0, without edits: argmaxes on the device, and one reading of them at a step's end.

The module `sampled` could do this as well; here there is no batch to pack and no kernel to compile.

Shapes: B sequences, of which b still draft; K draft tokens, R rows that decide, T packed tokens, H hidden.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.kernels import rules
from specdec.kernels.decisions import EXACT_MATCH, GREEDY, NOT_DRAFTED, NOT_FINITE, DraftChain, Verified, VerifyBatch
from specdec.kernels.flashinfer.drafts import deciding, on_host
from specdec.kernels.flashinfer.transfer import upload


class ChoosesArgmax(Protocol):
    """A backend with a head's argmax."""

    device: torch.device
    """Where tensors are."""

    def head_argmax(self, x: Tensor, head: Any) -> Tensor:
        """See `Operations.head_argmax`."""
        ...


class ArgmaxDraws:
    """The `specdec.kernels.flashinfer.chain.Draws` of chains without sampling: every draft is an argmax."""

    probs: Tensor | None = None
    """None: point masses have no distributions to keep."""

    def __init__(self, kernels: ChoosesArgmax, head: Any, chain: DraftChain) -> None:
        self._kernels, self._head = kernels, head
        self.prob_rows = [-1] * len(chain.counts)
        shape = len(chain.counts), max(chain.counts)
        self.ids = torch.full(shape, NOT_DRAFTED, device=kernels.device)  # [B, K]

    def draw(self, normed: Tensor, step: int, active: list[int]) -> None:
        best = self._kernels.head_argmax(normed, self._head)  # [b]
        sequences = upload(active, self._kernels.device, torch.int64)
        self.ids[:, step].index_copy_(0, sequences, torch.where(best < 0, NOT_FINITE, best))


def decides(batch: VerifyBatch) -> bool:
    """Returns whether the argmax of each row is all that a batch asks for."""
    return not (
        batch.keep_logits
        or any(batch.edits)
        or any(rule != EXACT_MATCH for rule in batch.rules)
        or any(stream != GREEDY for stream in batch.rows.streams)
    )


def decide(kernels: ChoosesArgmax, head: Any, hidden: Tensor, batch: VerifyBatch) -> Verified:
    """Decides a batch from the target's hidden states [T, H]. Choices and drafts are read from the device together."""
    choices = kernels.head_argmax(deciding(hidden, batch), head)  # [R]
    drafts = choices.new_empty(0) if batch.drafts.on_device is None else batch.drafts.on_device.flatten()
    numbers = torch.cat([choices, drafts]).tolist()
    known = on_host(batch.drafts, numbers[len(choices) :])
    each = iter(numbers)
    token_ids = [
        rules.match_choices([next(each) for _ in range(count + 1)], row)
        for count, row in zip(batch.drafts.counts, known)
    ]
    return Verified(hidden, token_ids, known)
