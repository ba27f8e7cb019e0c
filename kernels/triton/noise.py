"""Random numbers in kernels, to the bit those of `specdec.kernels.philox` as far as integers go.

Logarithms are the device's own, in fp64: on a GPU noise may differ from the reference's in the last place.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _words(calls, seed, stream, position, start):
    """Returns the four words of each call."""
    c = calls.to(tl.uint32)
    zero = c * 0
    return tl.philox(
        seed, c, zero + position.to(tl.uint32), zero + start.to(tl.uint32), zero + stream.to(tl.uint32), 10
    )


@triton.jit
def gumbel_noise(tile, seed, stream, position, start, TILE: tl.constexpr):
    """Returns Gumbel noise [TILE] for a tile of a row; token v takes word v % 4 of call v // 4."""
    calls = tile * (TILE // 4) + tl.arange(0, TILE // 4)
    w0, w1, w2, w3 = _words(calls, seed, stream, position, start)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return -tl.log(-tl.log((words.to(tl.float64) + 0.5) * 2.3283064365386963e-10))  # 2^-32


@triton.jit
def uniform(seed, stream, position, start):
    """Returns a number in [0, 1): 53 bits of the first two words of call 0."""
    w0, w1, _, _ = _words(position * 0, seed, stream, position, start)
    bits = (w0.to(tl.int64) << 21) ^ (w1.to(tl.int64) >> 11)
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def uniform_numbers(keys, stream, num, out):
    """Writes a uniform number for each key into out [num]. keys: seeds, positions, starts [3, num]."""
    n = tl.program_id(0)
    seed, position, start = tl.load(keys + n), tl.load(keys + num + n), tl.load(keys + 2 * num + n)
    tl.store(out + n, uniform(seed, position * 0 + stream, position, start))
