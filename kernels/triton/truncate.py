"""Top-k, top-p and min-p without sorting.

What stays is a beginning of the descending order, so all there is to find is the logit at which it ends. It is found
four bits of the logits' ordinals at a time, from the highest: per pass every tile adds up, for each of sixteen digits,
how many logits have it (top-k) or how much they weigh (top-p), and the next pass follows the digit in which the target
is crossed. Eight passes read the row eight times, mostly from the L2 cache, where a sort would move it more often.

Weights exp(scale * (logit - largest)) are whole multiples of a unit that leaves room for V of them in 62 bits. So sums
are exact: they do not depend on an order, and the logits that tie at the end can be counted by division. The unit is
2^-44 of the largest weight for 151,552 tokens; what rounding to it moves is below V * 2^-45 = 5e-9.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.triton.layout import MIN_P, SCALE, TOP_K, TOP_P
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

NUM_PASSES = 8
LAST_PASS = tl.constexpr(NUM_PASSES - 1)
DIGITS = tl.constexpr(16)


class Truncation:
    """Truncates rows of logits, with buffers for it."""

    def __init__(self, tiling: Tiling) -> None:
        self.tiling = tiling
        self.tops = tiling.scratch(dtype=torch.float32)
        # `sums` of one pass and of the one before; `states` of each pass: the digits so far, what lies above them, the
        # target
        self.sums = [tiling.scratch(DIGITS.value, dtype=torch.int64) for _ in range(2)]
        self.states = torch.empty(NUM_PASSES, tiling.num_slots, 3, dtype=torch.int64, device=tiling.device)
        self.unit = 2.0 ** (62 - tiling.vocab_size.bit_length())

    def run_(self, logits: Tensor, slots: Slots, *, cuts: bool) -> None:
        """Truncates every active row in place, see `Operations.truncate_`.

        logits: [R, V] fp32, contiguous.
        slots: the rows.
        cuts: the rows' `RowSampling.cuts`. Without it nothing is searched for, which spares most of the launches.
        """
        t = self.tiling
        t.check(logits)
        assert logits.dtype == torch.float32
        _survey[t.grid](logits, slots, t.vocab_size, self.tops, TILE=TILE, **UNFUSED)
        if cuts:
            self._search(logits, slots, by_weight=False)
            _drop_below_kth[t.grid](
                logits, slots, t.vocab_size, self.tops, self.sums[1], self.states, TILE=TILE, TILES=t.padded_tiles,
                **UNFUSED,
            )  # fmt: skip
            self._search(logits, slots, by_weight=True)
        _drop_the_rest[t.grid](
            logits, slots, t.vocab_size, self.tops, self.sums[1], self.states, UNIT=self.unit, TILE=TILE,
            TILES=t.padded_tiles, **UNFUSED,
        )  # fmt: skip

    def _search(self, logits: Tensor, slots: Slots, *, by_weight: bool) -> None:
        t = self.tiling
        for number in range(NUM_PASSES):
            _add_digits[t.grid](
                logits, slots, t.vocab_size, self.tops, self.sums[1 - number % 2], self.sums[number % 2], self.states,
                PASS=number, BY_WEIGHT=by_weight, UNIT=self.unit, TILE=TILE, TILES=t.padded_tiles, **UNFUSED,
            )  # fmt: skip


@triton.jit
def _survey(logits, slots, vocab_size, tops, TILE: tl.constexpr):
    """Leaves the largest logit of each tile; +inf where one is NaN."""
    tile, slot = tl.program_id(0), tl.program_id(1)
    _, _, row = locate(slots, slot)
    if row < 0:
        return
    x = load_tile(logits, row, vocab_size, tile_ids(tile, TILE))
    tl.store(tops + slot * tl.num_programs(0) + tile, tl.max(tl.where(x != x, float("inf"), x), 0))


@triton.jit
def _row_top(tops, slot, num_tiles, TILES: tl.constexpr):
    """Returns a row's largest logit, and whether the row is sound: that logit is finite."""
    top = tl.max(load_tiles(tops, slot, num_tiles, -float("inf"), TILES), 0)
    return top, (top > -float("inf")) & (top < float("inf"))


@triton.jit
def _ordinal(x):
    """Returns integers of 32 bits in the order of the floats; 0 and -0 are the same."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit
def _float(ordinal):
    bits = tl.where(ordinal < 2147483648, -1 - ordinal, ordinal - 2147483648)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, top, scale, UNIT: tl.constexpr):
    return (tl.exp((x.to(tl.float64) - top.to(tl.float64)) * scale) * UNIT + 0.5).to(tl.int64)


@triton.jit
def _cuts(slots, b, vocab_size, BY_WEIGHT: tl.constexpr):
    if BY_WEIGHT:
        wanted = real(slots, TOP_P, b) < 1
    else:
        top_k = field(slots, TOP_K, b)
        wanted = (top_k > 0) & (top_k < vocab_size)
    return wanted


@triton.jit
def _digit_sums(sums, slot, num_tiles, TILES: tl.constexpr):
    """Returns the sums [TILES, DIGITS] of a slot."""
    tiles, digits = tl.arange(0, TILES)[:, None], tl.arange(0, DIGITS)[None, :]
    return tl.load(sums + (slot * num_tiles + tiles) * DIGITS + digits, mask=tiles < num_tiles, other=0)


@triton.jit
def _state(states, number, slot, num_slots):
    at = states + (number * num_slots + slot) * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def _descend(sums, slot, num_tiles, prefix, above, target, TILES: tl.constexpr):
    """Returns the digits up to the one in which what lies above reaches the target, and what lies above those."""
    digits = tl.arange(0, DIGITS)
    each = tl.sum(_digit_sums(sums, slot, num_tiles, TILES), 0)
    reached = above + tl.cumsum(each, 0, reverse=True)
    crossed = tl.max(tl.where(reached >= target, digits, 0), 0)
    return prefix * DIGITS + crossed, above + tl.sum(tl.where(digits > crossed, each, 0), 0)


@triton.jit
def _add_digits(
    logits, slots, vocab_size, tops, before, sums, states, PASS: tl.constexpr, BY_WEIGHT: tl.constexpr,
    UNIT: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    tile, slot, num_tiles, num_slots = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    b, _, row = locate(slots, slot)
    if (row < 0) | ~_cuts(slots, b, vocab_size, BY_WEIGHT):
        return
    top, sound = _row_top(tops, slot, num_tiles, TILES)
    if ~sound:
        return
    prefix = slot.to(tl.int64) * 0
    above = prefix
    target = field(slots, TOP_K, b)
    if PASS > 0:
        prefix, above, target = _state(states, PASS - 1, slot, num_slots)
        if BY_WEIGHT and PASS == 1:
            total = tl.sum(tl.sum(_digit_sums(before, slot, num_tiles, TILES), 0), 0)
            share = tl.ceil(total.to(tl.float64) * real(slots, TOP_P, b)).to(tl.int64)
            target = tl.minimum(tl.maximum(share, 1), total)
        prefix, above = _descend(before, slot, num_tiles, prefix, above, target, TILES)
    if tile == 0:
        at = states + (PASS * num_slots + slot) * 3
        tl.store(at, prefix)
        tl.store(at + 1, above)
        tl.store(at + 2, target)
    ids = tile_ids(tile, TILE)
    x = load_tile(logits, row, vocab_size, ids)
    ordinals = _ordinal(x)
    counted = (ids < vocab_size) & ((ordinals >> (32 - 4 * PASS)) == prefix)
    digit = tl.where(counted, (ordinals >> (28 - 4 * PASS)) & 15, -1)
    amount = _weight(x, top, real(slots, SCALE, b), UNIT) if BY_WEIGHT else tl.full((TILE,), 1, tl.int64)
    for d in tl.static_range(DIGITS):
        tl.store(sums + (slot * num_tiles + tile) * DIGITS + d, tl.sum(tl.where(digit == d, amount, 0), 0))


@triton.jit
def _drop_below_kth(logits, slots, vocab_size, tops, sums, states, TILE: tl.constexpr, TILES: tl.constexpr):
    tile, slot, num_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    b, _, row = locate(slots, slot)
    if (row < 0) | ~_cuts(slots, b, vocab_size, False):
        return
    _, sound = _row_top(tops, slot, num_tiles, TILES)
    if ~sound:
        return
    prefix, above, target = _state(states, LAST_PASS, slot, tl.num_programs(1))
    kth, _ = _descend(sums, slot, num_tiles, prefix, above, target, TILES)
    ids = tile_ids(tile, TILE)
    x = load_tile(logits, row, vocab_size, ids)
    tl.store(logits + row * vocab_size + ids, tl.where(_ordinal(x) < kth, -float("inf"), x), mask=ids < vocab_size)


@triton.jit
def _drop_the_rest(
    logits, slots, vocab_size, tops, sums, states, UNIT: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr
):
    """Drops what top-p and min-p leave out, and fills rows that are not sound with NaN."""
    tile, slot, num_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    b, _, row = locate(slots, slot)
    if row < 0:
        return
    top, sound = _row_top(tops, slot, num_tiles, TILES)
    scale, min_p, by_weight = real(slots, SCALE, b), real(slots, MIN_P, b), _cuts(slots, b, vocab_size, True)
    if sound & ~by_weight & (min_p == 0):
        return
    ids = tile_ids(tile, TILE)
    x = load_tile(logits, row, vocab_size, ids)
    kept = tl.full((TILE,), 1, tl.int1)
    if sound & by_weight:
        prefix, above, target = _state(states, LAST_PASS, slot, tl.num_programs(1))
        last, above = _descend(sums, slot, num_tiles, prefix, above, target, TILES)
        ordinals = _ordinal(x)
        # Of those that tie at the end the lowest ids stay: as many as it takes to reach the target.
        one = _weight(_float(last), top, scale, UNIT)
        num_kept = (target - above + one - 1) // one
        tiles, digits = tl.arange(0, TILES)[:, None], tl.arange(0, DIGITS)[None, :]
        earlier = (tiles < tile) & (digits == last % DIGITS)
        tied_before = tl.sum(tl.sum(tl.where(earlier, _digit_sums(sums, slot, num_tiles, TILES), 0), 0), 0) // one
        tied = ordinals == last
        rank = tied_before + tl.cumsum(tied.to(tl.int64), 0)
        kept = (ordinals > last) | (tied & (rank <= num_kept))
    kept = kept & (tl.exp((x.to(tl.float64) - top.to(tl.float64)) * scale) >= min_p)
    x = tl.where(kept, x, -float("inf"))
    tl.store(logits + row * vocab_size + ids, tl.where(sound, x, float("nan")), mask=ids < vocab_size)
