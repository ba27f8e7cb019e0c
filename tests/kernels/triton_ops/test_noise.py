"""Random numbers of the Triton kernels: the reference's, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from specdec.kernels import philox
from specdec.kernels.triton import TritonSampling, noise
from support.sampled_rows import PHILOX_VECTORS

EDGES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
SEEDS = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**63 + 12345, 2**64 - 1]


@triton.jit
def words_kernel(counters, keys, out):
    n = tl.program_id(0)
    at = counters + 4 * n
    call, position, start, stream = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    w0, w1, w2, w3 = noise._words(call, tl.load(keys + n), stream, position, start)
    tl.store(out + 4 * n, w0.to(tl.int64))
    tl.store(out + 4 * n + 1, w1.to(tl.int64))
    tl.store(out + 4 * n + 2, w2.to(tl.int64))
    tl.store(out + 4 * n + 3, w3.to(tl.int64))


@triton.jit
def noise_kernel(keys, out, TILE: tl.constexpr):
    tile = tl.program_id(0)
    seed, stream, position, start = tl.load(keys), tl.load(keys + 1), tl.load(keys + 2), tl.load(keys + 3)
    values = noise.gumbel_noise(tile, seed, stream, position, start, TILE)
    tl.store(out + tile * TILE + tl.arange(0, TILE), values)


def words(counters: list[list[int]], seeds: list[int], device: torch.device) -> list[list[int]]:
    out = torch.zeros(len(seeds), 4, dtype=torch.int64, device=device)
    keys = torch.from_numpy(np.array(seeds, np.uint64).view(np.int64)).to(device)
    words_kernel[(len(seeds),)](torch.tensor(counters, device=device), keys, out)
    return out.tolist()


def test_published_vectors(device: torch.device) -> None:
    counters, keys, expected = (list(values) for values in zip(*PHILOX_VECTORS))
    assert words(counters, [low + (high << 32) for low, high in keys], device) == expected


def test_words_are_the_references_at_all_edges(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    counters = [[*rng.choice(EDGES, 3).tolist(), n % 4] for n in range(64)]
    seeds = [SEEDS[n % len(SEEDS)] for n in range(64)]
    expected = philox.philox(np.array(counters, np.uint32), philox.split_seed(np.array(seeds, np.uint64)))
    assert words(counters, seeds, device) == expected.tolist()


@pytest.mark.parametrize(("seed", "position", "start"), [(2**64 - 1, 2**32 - 1, 7), (5, 12, 2**31)])
def test_gumbel_noise_is_the_references(device: torch.device, seed: int, position: int, start: int) -> None:
    """To two units in the last place of the logarithms, of which a device may have its own."""
    keys = np.array([seed, 3, position, start], np.uint64).view(np.int64)
    out = torch.zeros(3 * 256, dtype=torch.float64, device=device)
    noise_kernel[(3,)](torch.from_numpy(keys).to(device), out, TILE=256)
    expected = philox.gumbel_noise([seed], [3], [position], [start], 3 * 256)[0]
    np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=2**-51, atol=2**-51)


@pytest.mark.parametrize("num", [0, 1, 40])
def test_uniforms_are_the_references(kernels: TritonSampling, num: int) -> None:
    seeds = [SEEDS[n % len(SEEDS)] ^ (977 * n) for n in range(num)]
    positions, starts = [EDGES[n % 5] for n in range(num)], [EDGES[n % 3] + n for n in range(num)]
    for stream in (2, 3):
        expected = philox.uniforms(seeds, [stream] * num, positions, starts).tolist()
        assert kernels.uniforms(seeds, stream, positions, starts) == expected
