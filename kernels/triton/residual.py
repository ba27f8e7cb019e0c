"""Residual distributions max(0, scale * p - q), in fp64: their sums, and a token by inverse CDF."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.triton.slots import TILE, UNFUSED, Tiling, load_tiles, tile_ids

P_ROW, Q_ROW, EXCLUDED, PLACE = (tl.constexpr(i) for i in range(4))


class Laws(NamedTuple):
    """Residual distributions on the device, see `specdec.kernels.decisions.Residuals`."""

    p: Tensor
    """[R, V] fp32: the target's probabilities."""
    q: Tensor
    """[..., V] fp32: the probabilities that drafts were drawn from."""
    ints: Tensor
    """[4, num] int64. P_ROW: row of p, -1 where there is nothing to do. Q_ROW: row of q, -1: q is 0. EXCLUDED: a token,
    or -1. PLACE: where the token goes in the result."""
    scales: Tensor
    """[num] fp64: factors of p."""
    num: int
    """Number of distributions."""


class Residual:
    """Sums and samples as many residual distributions as the tiling has slots."""

    def __init__(self, tiling: Tiling) -> None:
        self.tiling = tiling
        self.sums = tiling.scratch(dtype=torch.float64)
        self.p_sums = tiling.scratch(dtype=torch.float64)

    def survey(self, laws: Laws) -> Tensor:
        """Adds up each tile of each distribution; returns the sums [num_slots, num_tiles], valid where there is one."""
        t = self.tiling
        t.check(laws.p)
        t.check(laws.q)
        _survey[t.grid](laws, t.vocab_size, self.sums, self.p_sums, TILE=TILE, **UNFUSED)
        return self.sums

    def sample(self, laws: Laws, uniforms: Tensor, tokens: Tensor) -> None:
        """Writes a token of each distribution into its place. Call it after `survey`.

        uniforms: [num] fp64, numbers in [0, 1).
        tokens: int64, written at the PLACEs.
        """
        t = self.tiling
        _sample[(t.num_slots,)](
            laws, t.vocab_size, self.sums, self.p_sums, uniforms, tokens, t.num_tiles, TILE=TILE, TILES=t.padded_tiles,
            **UNFUSED,
        )  # fmt: skip


@triton.jit
def _int(laws, name: tl.constexpr, n):
    return tl.load(laws.ints + name * laws.num + n)


@triton.jit
def _load(laws, p_row, q_row, scale, excluded, vocab_size, ids):
    """Returns p of the tokens `ids`, and their mass in the residual distribution."""
    p = tl.load(laws.p + p_row * vocab_size + ids, mask=ids < vocab_size, other=0.0).to(tl.float64)
    q_size = tl.where(q_row >= 0, vocab_size, 0)
    q = tl.load(laws.q + q_row * vocab_size + ids, mask=ids < q_size, other=0.0).to(tl.float64)
    left = scale * p - q
    return p, tl.where((left < 0) | (ids == excluded), 0.0, left)  # NaN stays


@triton.jit
def _survey(laws, vocab_size, sums, p_sums, TILE: tl.constexpr):
    tile, n = tl.program_id(0), tl.program_id(1)
    p_row = _int(laws, P_ROW, n)
    if p_row < 0:
        return
    scale = tl.load(laws.scales + n)
    ids = tile_ids(tile, TILE)
    p, law = _load(laws, p_row, _int(laws, Q_ROW, n), scale, _int(laws, EXCLUDED, n), vocab_size, ids)
    at = n * tl.num_programs(0) + tile
    tl.store(sums + at, tl.sum(law, 0))
    tl.store(p_sums + at, tl.sum(p, 0))


@triton.jit
def _crossing(upto, mass, target, SIZE: tl.constexpr):
    """Returns the index of the first entry with mass whose cumulative sum `upto` exceeds `target`; if rounding leaves
    none, that of the last entry with mass."""
    places = tl.arange(0, SIZE)
    first = tl.min(tl.where((mass > 0) & (upto > target), places, SIZE), 0)
    last = tl.max(tl.where(mass > 0, places, 0), 0)
    return tl.where(first < SIZE, first, last)


@triton.jit
def _sample(
    laws, vocab_size, sums, p_sums, uniforms, tokens, num_tiles, TILE: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0)
    p_row = _int(laws, P_ROW, n)
    if p_row < 0:
        return
    q_row, excluded, scale = _int(laws, Q_ROW, n), _int(laws, EXCLUDED, n), tl.load(laws.scales + n)
    mass = load_tiles(sums, n, num_tiles, 0.0, TILES)
    empty = tl.sum(mass, 0) == 0
    mass = tl.where(empty, load_tiles(p_sums, n, num_tiles, 0.0, TILES), mass)
    q_row, excluded, scale = tl.where(empty, -1, q_row), tl.where(empty, -1, excluded), tl.where(empty, 1.0, scale)
    total = tl.sum(mass, 0)
    target = tl.load(uniforms + n) * total
    tile = _crossing(tl.cumsum(mass, 0), mass, target, TILES)
    below = tl.sum(tl.where(tl.arange(0, TILES) < tile, mass, 0.0), 0)
    _, law = _load(laws, p_row, q_row, scale, excluded, vocab_size, tile_ids(tile, TILE))
    token = tile * TILE + _crossing(below + tl.cumsum(law, 0), law, target, TILE)
    tl.store(tokens + _int(laws, PLACE, n), tl.where((total > 0) & (total < float("inf")), token, -1).to(tl.int64))
