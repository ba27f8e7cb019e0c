"""Turns a target forward's logits into accepted tokens, on the device: no call here waits for it.

Every buffer has a fixed size and address, and launches depend on nothing but `Batch.cuts`, so they can be captured into
a CUDA graph: of a batch that cuts, for all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.triton import rules
from specdec.kernels.triton.choose import Choice
from specdec.kernels.triton.edits import edit_
from specdec.kernels.triton.layout import Batch
from specdec.kernels.triton.residual import Laws, Residual
from specdec.kernels.triton.slots import UNFUSED, Slots, Tiling, verified_slots
from specdec.kernels.triton.softmax import Softmax
from specdec.kernels.triton.truncate import Truncation


class Decided(NamedTuple):
    """What was decided, on the device. Padding accepts 0 drafts and emits nothing."""

    num_accepted: Tensor
    """[B] int64: how many drafts each sequence accepts."""
    token_ids: Tensor
    """[B, K + 1] int64: the accepted drafts and one token more, which is -1 where logits that decide are not finite;
    then -1."""

    def tolist(self) -> list[list[int]]:
        """Returns what each sequence emits, [B]; waits for the device."""
        return [row[: n + 1] for n, row in zip(self.num_accepted.tolist(), self.token_ids.tolist())]


class Decider:
    """Verifies `batch`es: `batch.pack_verification` on the host, then `decide` on the device."""

    def __init__(self, batch: Batch, vocab_size: int) -> None:
        num, num_drafts, device = batch.size, batch.num_drafts, batch.device
        self.batch, self.vocab_size = batch, vocab_size
        tiling = Tiling(num * (num_drafts + 1), vocab_size, device)
        self._truncation, self._choice, self._softmax = Truncation(tiling), Choice(tiling), Softmax(tiling)
        self._inner = Residual(Tiling(num * num_drafts, vocab_size, device))
        self._final = Residual(Tiling(num, vocab_size, device))

        def doubles(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float64, device=device)

        def ints(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int64, device=device)

        self._ratios, self._reached = doubles(num, num_drafts), doubles(num, num_drafts + 1)
        self._inner_laws, self._inner_scales = ints(4, num * num_drafts), doubles(num * num_drafts)
        self._final_laws, self._final_scales, self._uniforms = ints(4, num), doubles(num), doubles(num)
        self._decided = Decided(ints(num), ints(num, num_drafts + 1))

    def decide(self, logits: Tensor, drafts: Tensor, draft_probs: Tensor | None) -> Decided:
        """Decides the packed batch; returns buffers that the next call overwrites.

        logits: [R, V] fp32, which are overwritten.
        drafts: [B, K], -1 padded: the batch's own, or those of a device's chain, which may be fewer than was packed.
        draft_probs: [Q, K', V] fp32, the distributions that drafts were drawn from; None without any.
        """
        self.transform_(logits, drafts)
        return self.emit(logits, drafts, draft_probs)

    def transform_(self, logits: Tensor, drafts: Tensor) -> None:
        """Does the first half of `decide`: edits and truncation, in place; `Verified.processed` is the result."""
        slots = verified_slots(self.batch, drafts)
        edit_(logits, slots)
        self._truncation.run_(logits, slots, cuts=self.batch.cuts)

    def emit(self, logits: Tensor, drafts: Tensor, draft_probs: Tensor | None) -> Decided:
        """Does the second half of `decide`: the rules. Rows that rejection decides on become probabilities."""
        slots = verified_slots(self.batch, drafts)
        choices = self._choice.run(logits, slots)
        self._softmax.normalise_(logits, slots)
        q = logits.unsqueeze(1) if draft_probs is None else draft_probs  # without distributions nothing of it is read
        assert q.dtype == torch.float32
        self._reach(logits, q, slots)
        self._accept(choices, q, slots)
        final = Laws(logits, q, self._final_laws, self._final_scales, slots.size)
        self._final.survey(final)
        self._final.sample(final, self._uniforms, self._decided.token_ids)
        return self._decided

    def _reach(self, probs: Tensor, q: Tensor, slots: Slots) -> None:
        rules.reach[(slots.size,)](
            probs, q, slots, self.vocab_size, q.shape[1], self._ratios, self._reached, self._inner_laws,
            self._inner_scales, **UNFUSED,
        )  # fmt: skip
        if slots.num_drafts > 0:
            num = slots.size * slots.num_drafts
            self._inner.survey(Laws(probs, q, self._inner_laws, self._inner_scales, num))

    def _accept(self, choices: Tensor, q: Tensor, slots: Slots) -> None:
        tiling = self._inner.tiling
        rules.accept[(slots.size,)](
            slots, choices, self._ratios, self._reached, self._inner.sums, tiling.num_tiles, q.shape[1],
            *self._decided, self._final_laws, self._final_scales, self._uniforms, TILES=tiling.padded_tiles, **UNFUSED,
        )  # fmt: skip
