"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC'11), keyed by the request's seed.

Every number is a function of (seed, stream, position, iteration start, token) and of nothing else, so
a request's tokens depend neither on the batch nor on scheduling. The rejection rules key their numbers
by the iteration's start as well: a later iteration must not reuse noise that an earlier one was
conditioned on.
"""

from __future__ import annotations

import secrets
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specdec.kernels.philox import philox, split_seed


class Stream(IntEnum):
    """Independent sources within a request; the fourth counter word. 0 is kept for the target's own noise."""

    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


def uniforms(
    seeds: ArrayLike, stream: Stream, positions: ArrayLike, iteration_starts: ArrayLike
) -> NDArray[np.float64]:
    """Numbers in [0, 1) of 53 random bits; the arguments broadcast to the result's shape.

    seeds: the requests' 64-bit seeds; positions: absolute positions of the tokens to be decided;
    iteration_starts: the position at which the iteration that decides them began.
    """
    seed, position, start = np.broadcast_arrays(
        np.asarray(seeds, np.uint64), np.asarray(positions, np.uint64), np.asarray(iteration_starts, np.uint64)
    )
    counter = np.stack([np.zeros_like(position), position, start, np.full_like(position, stream)], -1)
    words = philox(counter.astype(np.uint32), split_seed(seed)).astype(np.uint64)
    return ((words[..., 0] << np.uint64(21)) ^ (words[..., 1] >> np.uint64(11))).astype(np.float64) * 2.0**-53


def draw_seed() -> int:
    """A fresh seed for a request that brings none."""
    return secrets.randbits(64)
