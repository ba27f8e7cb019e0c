"""Philox4x32-10 (Salmon et al., SC'11), the counter-based generator behind every random number here.

The key is a request's 64-bit seed, the counter (call, position, start, stream); a call gives four words.
`specdec.request.seeds` says what positions and starts are.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


class Stream(IntEnum):
    """Independent sources of random numbers within a request."""

    TARGET = 0
    """Noise of the target's own tokens; in coupled verification that of the drafts, too."""
    DRAFT = 1
    """Noise of drafts that a rejection rule verifies."""
    ACCEPT = 2
    """Uniforms that decide whether drafts are accepted."""
    RESIDUAL = 3
    """Uniforms that draw the token after the accepted drafts, under a rejection rule."""


def philox(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Returns four words [..., 4], each uniform on 0 .. 2**32 - 1, of counter [..., 4] and key [..., 2]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def split_seed(seeds: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Returns the keys [..., 2] of 64-bit seeds [...], the low word first."""
    return np.stack([seeds & _LOW, seeds >> _SHIFT], -1).astype(np.uint32)


def gumbel_noise(
    seeds: ArrayLike, streams: ArrayLike, positions: ArrayLike, starts: ArrayLike, vocab_size: int
) -> NDArray[np.float64]:
    """Returns standard Gumbel noise [R, V]: token v takes word v % 4 of call v // 4, and
    G = -log(-log((word + 1/2) / 2^32)).

    seeds, streams, positions, starts: [R], the keys and counters of the rows.
    vocab_size: V.
    """
    words = _words(np.arange(-(-vocab_size // 4)), seeds, streams, positions, starts)  # [R, calls, 4]
    uniforms = (words.reshape(len(words), -1)[:, :vocab_size] + 0.5) * 2.0**-32
    return -np.log(-np.log(uniforms))


def uniforms(seeds: ArrayLike, streams: ArrayLike, positions: ArrayLike, starts: ArrayLike) -> NDArray[np.float64]:
    """Returns numbers in [0, 1) of 53 random bits, [n], from the first two words of call 0 of each key [n]."""
    words = _words(np.zeros(1), seeds, streams, positions, starts)[:, 0].astype(np.uint64)
    return ((words[:, 0] << np.uint64(21)) ^ (words[:, 1] >> np.uint64(11))).astype(np.float64) * 2.0**-53


def _words(
    calls: ArrayLike, seeds: ArrayLike, streams: ArrayLike, positions: ArrayLike, starts: ArrayLike
) -> NDArray[np.uint32]:
    """Returns the words [n, c, 4] of calls [c] of each key [n]."""
    words = np.broadcast_arrays(
        np.asarray(calls)[None], *(np.asarray(w)[:, None] for w in (positions, starts, streams))
    )
    return philox(np.stack(words, -1).astype(np.uint32), split_seed(np.asarray(seeds, np.uint64))[:, None])
