"""A chain's draws on the device, one step at a time: nothing is compacted, and no call waits for the device.

Sequences whose chain has ended stay in the batch; what is computed in their rows goes nowhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels import decisions
from specdec.kernels.triton.choose import Choice
from specdec.kernels.triton.edits import edit_
from specdec.kernels.triton.layout import CONFIDENCE, LAW, Batch
from specdec.kernels.triton.slots import UNFUSED, Tiling, drafted_slots, field, locate, real
from specdec.kernels.triton.softmax import Softmax, row_sum
from specdec.kernels.triton.truncate import Truncation

NOT_DRAFTED = tl.constexpr(decisions.NOT_DRAFTED)
NOT_FINITE = tl.constexpr(decisions.NOT_FINITE)


class Drawer:
    """Draws the drafts of `batch`es: `batch.pack_drafting` on the host, which empties `batch.drafts`, then `draw` for
    each step on the device."""

    def __init__(self, batch: Batch, vocab_size: int) -> None:
        self.batch, self.vocab_size = batch, vocab_size
        tiling = Tiling(batch.size, vocab_size, batch.device)
        self._truncation, self._choice, self._softmax = Truncation(tiling), Choice(tiling), Softmax(tiling)

    def draw(self, logits: Tensor, step: int, draft_probs: Tensor | None) -> None:
        """Draws one draft of each sequence into batch.drafts[:, step].

        It is NOT_DRAFTED where the chain ends or has ended, NOT_FINITE where it ends because logits are not finite.
        Unlike in `Backend.draft_chain` the others go on then.

        logits: [B, V] fp32, which are overwritten.
        step: number of the draft, from 0.
        draft_probs: [Q, K', V] fp32, filled with the distributions that are kept; None for none.
        """
        slots = drafted_slots(self.batch, self.batch.drafts, step)
        edit_(logits, slots)
        self._truncation.run_(logits, slots, cuts=self.batch.cuts)
        choices = self._choice.run(logits, slots)
        self._softmax.survey(logits, slots)
        if draft_probs is not None:
            assert draft_probs.dtype == torch.float32
            self._softmax.store_laws(logits, slots, draft_probs)
        s = self._softmax
        _settle[(slots.size,)](
            slots, choices, s.tops, s.sums, s.tiling.num_tiles, TILES=s.tiling.padded_tiles, **UNFUSED
        )  # fmt: skip


@triton.jit
def _settle(slots, choices, tops, sums, num_tiles, TILES: tl.constexpr):
    slot = tl.program_id(0)
    b, i, row = locate(slots, slot)
    if row < 0:
        return
    choice = tl.load(choices + slot)
    token = tl.where(choice < 0, NOT_FINITE, choice)
    if field(slots, LAW, b) != 0:
        _, total = row_sum(slots, slot, b, num_tiles, tops, sums, TILES)
        largest = (1.0 / total).to(tl.float32).to(tl.float64)
        token = tl.where(largest < real(slots, CONFIDENCE, b), NOT_DRAFTED, token)
    tl.store(slots.drafts + b * slots.num_drafts + i, token)
