"""Philox4x32-10 (Salmon et al., SC'11), the counter-based generator behind every random number here."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


def philox(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """counter [..., 4], key [..., 2] -> [..., 4], each word uniform on 0 .. 2**32 - 1."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def split_seed(seeds: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """64-bit seeds [...] -> keys [..., 2], the low word first."""
    return np.stack([seeds & _LOW, seeds >> _SHIFT], -1).astype(np.uint32)


def gumbel_noise(seeds: ArrayLike, positions: ArrayLike, vocab_size: int) -> NDArray[np.float64]:
    """seeds, positions [R] -> standard Gumbel noise [R, V]; see `Kernels.gumbel_argmax`."""
    calls = np.arange(-(-vocab_size // 4), dtype=np.uint32)
    counter = np.zeros((len(np.atleast_1d(positions)), len(calls), 4), np.uint32)
    counter[..., 0] = calls
    counter[..., 1] = np.asarray(positions)[:, None]
    words = philox(counter, split_seed(np.asarray(seeds, np.uint64))[:, None])
    uniforms = (words.reshape(len(counter), -1)[:, :vocab_size] + 0.5) * 2.0**-32
    return -np.log(-np.log(uniforms))
