"""One token per row: the argmax, or the argmax with Gumbel noise, which is a sample of the softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels import decisions
from specdec.kernels.triton.layout import POSITION, RULE, SCALE, SEED, START, STREAM
from specdec.kernels.triton.noise import gumbel_noise
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

EXACT_MATCH = tl.constexpr(decisions.EXACT_MATCH)
GREEDY = tl.constexpr(decisions.GREEDY)


class Choice:
    """Chooses a token for each slot, with buffers for it."""

    def __init__(self, tiling: Tiling) -> None:
        self.tiling = tiling
        self.scores = tiling.scratch(dtype=torch.float64)
        self.ids = tiling.scratch(dtype=torch.int64)
        self.choices = torch.empty(tiling.num_slots, dtype=torch.int64, device=tiling.device)

    def run(self, logits: Tensor, slots: Slots) -> Tensor:
        """Returns ids [slots], valid for the rows that exact match decides; -1 where a row has a NaN or +inf, or no
        finite logit."""
        t = self.tiling
        t.check(logits)
        _best_of_tile[t.grid](logits, slots, t.vocab_size, self.scores, self.ids, TILE=TILE, **UNFUSED)
        _best_of_row[(t.num_slots,)](
            slots, self.scores, self.ids, t.num_tiles, self.choices, TILES=t.padded_tiles, **UNFUSED
        )
        return self.choices


@triton.jit
def _best_of_tile(logits, slots, vocab_size, scores, best_ids, TILE: tl.constexpr):
    tile, slot = tl.program_id(0), tl.program_id(1)
    b, i, row = locate(slots, slot)
    if (row < 0) | (field(slots, RULE, b) != EXACT_MATCH):
        return
    ids = tile_ids(tile, TILE)
    x = load_tile(logits, row, vocab_size, ids).to(tl.float64)
    score = x
    stream = field(slots, STREAM, b)
    if stream != GREEDY:
        position = field(slots, POSITION, b) + i
        noise = gumbel_noise(tile, field(slots, SEED, b), stream, position, field(slots, START, b), TILE)
        score = x * real(slots, SCALE, b) + noise
    score = tl.where((x != x) | (x == float("inf")), float("inf"), score)
    best = tl.max(score, 0)
    at = slot * tl.num_programs(0) + tile
    tl.store(scores + at, best)
    tl.store(best_ids + at, tl.min(tl.where(score == best, ids, vocab_size), 0))


@triton.jit
def _best_of_row(slots, scores, best_ids, num_tiles, choices, TILES: tl.constexpr):
    slot = tl.program_id(0)
    b, _, row = locate(slots, slot)
    if (row < 0) | (field(slots, RULE, b) != EXACT_MATCH):
        return
    score = load_tiles(scores, slot, num_tiles, -float("inf"), TILES)
    ids = load_tiles(best_ids, slot, num_tiles, 0, TILES)
    best = tl.max(score, 0)
    sound = (best > -float("inf")) & (best < float("inf"))
    lowest = tl.min(tl.where(score == best, ids, 9223372036854775807), 0)
    tl.store(choices + slot, tl.where(sound, lowest, -1))
