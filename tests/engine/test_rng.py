from __future__ import annotations

import numpy as np
import pytest

from specdec.kernels.philox import gumbel_noise, philox, uniforms
from specdec.request.seeds import Stream, draw_seed
from support.sampled_rows import PHILOX_VECTORS


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_VECTORS)
def test_philox_gives_the_published_vectors(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox(np.array(counter, np.uint32), np.array(key, np.uint32)).tolist() == expected


def test_philox_is_elementwise() -> None:
    counters, keys = (np.array([v[i] for v in PHILOX_VECTORS], np.uint32) for i in (0, 1))
    assert philox(counters, keys).tolist() == [v[2] for v in PHILOX_VECTORS]


def test_every_part_of_the_key_matters_and_nothing_else() -> None:
    base = (1, Stream.DRAFT, 5, 3)
    others = [(2**40, Stream.DRAFT, 5, 3), (1, Stream.ACCEPT, 5, 3), (1, Stream.DRAFT, 6, 3), (1, Stream.DRAFT, 5, 4)]
    together = uniforms(*zip(base, *others, base))
    assert len(set(together.tolist())) == 5
    assert together[0] == together[-1] == uniforms(*zip(base))[0]
    noise = gumbel_noise(*zip(base, *others, base), 11)
    assert len({tuple(row) for row in noise.tolist()}) == 5
    assert (noise[-1] == noise[0]).all()
    assert (noise[0, :7] == gumbel_noise(*zip(base), 7)[0]).all(), "of the vocabulary's size, too"


def test_the_whole_seed_is_the_key() -> None:
    assert len(set(uniforms([2**64 - 1, 2**32 - 1, 2**64 - 2**32], [1] * 3, [0] * 3, [0] * 3).tolist())) == 3


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    u = uniforms([9], [Stream.RESIDUAL], np.arange(200_000), [0])
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    assert ((counts - 2000.0) ** 2 / 2000).sum() < 99 + 5 * (2 * 99) ** 0.5


def test_drawn_seeds_are_fresh_and_exact_as_doubles() -> None:
    seeds = {draw_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= s < 2**53 and int(float(s)) == s for s in seeds)
    assert max(seeds) >= 2**45
