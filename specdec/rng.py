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

__all__ = ["Stream", "draw_seed"]


def draw_seed() -> int:
    """A fresh seed for a request that brings none."""
    return secrets.randbits(64)
