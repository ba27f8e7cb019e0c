"""How kernels find their row: a slot is a sequence at a step, and a tile is a stretch of a row.

One program serves a tile of a slot. What it adds up is combined in an order that depends on the vocabulary's size
alone, so a row's bits depend on nothing but the row. Kernels that need a whole row's sums get those of its tiles from
the launch before and combine them for themselves: no program waits for another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.triton.layout import FIRST, LAST, ROW, Batch

TILE = 1024
# A fused multiply-add rounds once where the reference rounds twice.
UNFUSED: dict[str, Any] = {"enable_fp_fusion": False}


class Slots(NamedTuple):
    """The rows of a launch, by slot: slot s is sequence s // steps at step first + s % steps."""

    words: Tensor
    """The batch's buffer, `Batch.words`."""
    drafts: Tensor
    """[size, num_drafts] int64, contiguous, -1 padded."""
    size: int
    """Number of sequences, padding included."""
    num_drafts: int
    """Room for drafts of a sequence."""
    first: int
    """First step, the number of drafts before a row."""
    steps: int
    """Number of steps of each sequence."""


def verified_slots(batch: Batch, drafts: Tensor) -> Slots:
    """Returns the slots of a verification: the rows before, between and after a sequence's drafts."""
    return _slots(batch, drafts, 0, batch.num_drafts + 1)


def drafted_slots(batch: Batch, drafts: Tensor, step: int) -> Slots:
    """Returns the slots of a draw: one row per sequence, which gives draft `step`."""
    return _slots(batch, drafts, step, 1)


def _slots(batch: Batch, drafts: Tensor, first: int, steps: int) -> Slots:
    assert drafts.shape == (batch.size, batch.num_drafts)
    assert drafts.dtype == torch.int64
    assert drafts.is_contiguous()
    return Slots(batch.words, drafts, batch.size, batch.num_drafts, first, steps)


@dataclass(frozen=True)
class Tiling:
    """How rows are divided among programs."""

    num_slots: int
    """Number of rows."""
    vocab_size: int
    """Length of a row, V."""
    device: torch.device
    """Where buffers are allocated."""

    @property
    def num_tiles(self) -> int:
        """Tiles of a row."""
        return triton.cdiv(self.vocab_size, TILE)

    @property
    def padded_tiles(self) -> int:
        """Number of tiles rounded up to a power of two, which a kernel loads to see all of them."""
        return triton.next_power_of_2(self.num_tiles)

    @property
    def grid(self) -> tuple[int, int]:
        """One program for each tile of each slot."""
        return self.num_tiles, self.num_slots

    def scratch(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Returns an uninitialised buffer [num_slots, num_tiles, *shape]."""
        return torch.empty(self.num_slots, self.num_tiles, *shape, dtype=dtype, device=self.device)

    def check(self, logits: Tensor) -> None:
        """Asserts that logits [..., V] are what kernels of this tiling can read."""
        assert logits.shape[-1] == self.vocab_size
        assert logits.is_contiguous()


@triton.jit
def field(slots, name: tl.constexpr, b):
    """Returns an integer field of sequence b."""
    return tl.load(slots.words + name * slots.size + b)


@triton.jit
def real(slots, name: tl.constexpr, b):
    """Returns a field of sequence b that is a double."""
    return field(slots, name, b).to(tl.float64, bitcast=True)


@triton.jit
def draft_at(slots, b, i):
    """Returns draft i of sequence b; -1 before the first one and after the last."""
    return tl.load(slots.drafts + b * slots.num_drafts + i, mask=(i >= 0) & (i < slots.num_drafts), other=-1)


@triton.jit
def locate(slots, slot):
    """Returns sequence, step and row of a slot; row -1 where it is not active, as after the end of a chain."""
    b = slot // slots.steps
    i = slots.first + slot % slots.steps
    active = (
        (i >= field(slots, FIRST, b)) & (i <= field(slots, LAST, b)) & ((i == 0) | (draft_at(slots, b, i - 1) >= 0))
    )
    row = field(slots, ROW, b) + slot % slots.steps
    return b, i, tl.where(active, row, -1)


@triton.jit
def tile_ids(tile, TILE: tl.constexpr):
    return tile * TILE + tl.arange(0, TILE)


@triton.jit
def load_tile(logits, row, vocab_size, ids):
    """Returns the logits of the tokens `ids` in a row; -inf beyond the vocabulary."""
    return tl.load(logits + row * vocab_size + ids, mask=ids < vocab_size, other=-float("inf"))


@triton.jit
def load_tiles(values, slot, num_tiles, other, TILES: tl.constexpr):
    """Returns what the tiles of a slot left, [TILES], `other` beyond the last."""
    tiles = tl.arange(0, TILES)
    return tl.load(values + slot * num_tiles + tiles, mask=tiles < num_tiles, other=other)
