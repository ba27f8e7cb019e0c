"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC'11), keyed by the request's seed.

Every number is a function of (seed, stream, position, start, token) and of nothing else, so a request's tokens
depend neither on the batch nor on scheduling. `position` is the absolute position of the token that is decided,
`start` the position at which the iteration that decides it began.

The rejection rules key their numbers by the start as well: a later iteration must not reuse noise that an earlier one
was conditioned on. Coupled verification draws drafts and the target's own tokens from one noise, keyed by position
alone (start 0): that is what makes its output independent of the drafts.
"""

from __future__ import annotations

import secrets

from specdec.kernels.philox import Stream

__all__ = ["Stream", "draw_seed", "sample_seed"]

SEED_BITS = 53  # of seeds made here: readers of JSON that take numbers as doubles round larger ones
_MASK = 2**64 - 1


def draw_seed() -> int:
    """Draws a seed for a request that brings none."""
    return secrets.randbits(SEED_BITS)


def sample_seed(seed: int, sample: int) -> int:
    """Derives the seed of a request's sample: the request's own for sample 0, else the upper 53 bits of a number by
    SplitMix64 (Steele et al. 2014).

    Those numbers differ for different samples in all 64 bits; that two of a request's 128 samples agree in the upper 53
    has a probability below 1e-12.

    seed: the request's.
    sample: the number of the sample, from 0.
    """
    if sample == 0:
        return seed
    z = (seed + sample * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> (64 - SEED_BITS)
