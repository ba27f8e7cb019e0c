"""Distributions: softmax(scale * logits), with the row's largest logit and its sum in fp64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.triton.layout import LAW, PROB_ROW, SCALE
from specdec.kernels.triton.slots import (
    TILE,
    UNFUSED,
    Slots,
    Tiling,
    field,
    load_tile,
    load_tiles,
    locate,
    real,
    tile_ids,
)


class Softmax:
    """Turns rows of logits into distributions, with buffers for it."""

    def __init__(self, tiling: Tiling) -> None:
        self.tiling = tiling
        self.tops = tiling.scratch(dtype=torch.float64)
        self.sums = tiling.scratch(dtype=torch.float64)

    def survey(self, logits: Tensor, slots: Slots) -> None:
        """Leaves the largest logit and the sum of every tile, of the rows that become distributions."""
        t = self.tiling
        t.check(logits)
        _survey[t.grid](logits, slots, t.vocab_size, self.tops, self.sums, TILE=TILE, **UNFUSED)

    def normalise_(self, logits: Tensor, slots: Slots) -> None:
        """Turns the rows that become distributions into them, in place."""
        t = self.tiling
        self.survey(logits, slots)
        _normalise[t.grid](
            logits, slots, t.vocab_size, self.tops, self.sums, TILE=TILE, TILES=t.padded_tiles, **UNFUSED
        )  # fmt: skip

    def store_laws(self, logits: Tensor, slots: Slots, probs: Tensor) -> None:
        """Writes the distributions of sequences that have a row in probs [Q, K, V]. Call it after `survey`."""
        t = self.tiling
        t.check(probs)
        _store_laws[t.grid](
            logits, slots, t.vocab_size, self.tops, self.sums, probs, probs.shape[1], TILE=TILE, TILES=t.padded_tiles,
            **UNFUSED,
        )  # fmt: skip


@triton.jit
def _survey(logits, slots, vocab_size, tops, sums, TILE: tl.constexpr):
    tile, slot = tl.program_id(0), tl.program_id(1)
    b, _, row = locate(slots, slot)
    if (row < 0) | (field(slots, LAW, b) == 0):
        return
    x = load_tile(logits, row, vocab_size, tile_ids(tile, TILE)).to(tl.float64)
    top = tl.max(x, 0)
    weights = tl.where(x == -float("inf"), 0.0, tl.exp((x - top) * real(slots, SCALE, b)))
    at = slot * tl.num_programs(0) + tile
    tl.store(tops + at, top)
    tl.store(sums + at, tl.sum(weights, 0))


@triton.jit
def row_sum(slots, slot, b, num_tiles, tops, sums, TILES: tl.constexpr):
    """Returns the largest logit of a row, and the sum of exp(scale * (logit - largest))."""
    each = load_tiles(tops, slot, num_tiles, -float("inf"), TILES)
    top = tl.max(each, 0)
    shrink = tl.where(each == -float("inf"), 0.0, tl.exp((each - top) * real(slots, SCALE, b)))
    return top, tl.sum(load_tiles(sums, slot, num_tiles, 0.0, TILES) * shrink, 0)


@triton.jit
def _law(logits, slots, slot, b, row, vocab_size, tops, sums, ids, TILES: tl.constexpr):
    top, total = row_sum(slots, slot, b, tl.num_programs(0), tops, sums, TILES)
    x = load_tile(logits, row, vocab_size, ids).to(tl.float64)
    return tl.exp((x - top) * real(slots, SCALE, b)) / total


@triton.jit
def _normalise(logits, slots, vocab_size, tops, sums, TILE: tl.constexpr, TILES: tl.constexpr):
    tile, slot = tl.program_id(0), tl.program_id(1)
    b, _, row = locate(slots, slot)
    if (row < 0) | (field(slots, LAW, b) == 0):
        return
    ids = tile_ids(tile, TILE)
    law = _law(logits, slots, slot, b, row, vocab_size, tops, sums, ids, TILES)
    tl.store(logits + row * vocab_size + ids, law.to(tl.float32), mask=ids < vocab_size)


@triton.jit
def _store_laws(
    logits, slots, vocab_size, tops, sums, probs, num_steps, TILE: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    tile, slot = tl.program_id(0), tl.program_id(1)
    b, i, row = locate(slots, slot)
    prob_row = field(slots, PROB_ROW, b)
    if (row < 0) | (prob_row < 0):
        return
    ids = tile_ids(tile, TILE)
    law = _law(logits, slots, slot, b, row, vocab_size, tops, sums, ids, TILES)
    at = (prob_row * num_steps + i) * vocab_size + ids
    tl.store(probs + at, law.to(tl.float32), mask=ids < vocab_size)
