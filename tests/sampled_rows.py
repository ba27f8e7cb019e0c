"""Rows of logits with every sort of parameter, for the tests of kernels."""

from __future__ import annotations

import random
from array import array
from itertools import accumulate

from specdec.kernels.interface import LogitEdits, RowSampling


def mixed_rows(num: int, streams: list[int]) -> RowSampling:
    """Temperatures, cuts and streams in turns; the keys of the noise differ."""
    return RowSampling(
        scales=[[1.0, 2.5, 0.7][b % 3] for b in range(num)],
        top_k=[[0, 20, 3][b % 3] for b in range(num)],
        top_p=[[0.9, 1.0, 0.8, 0.97][b % 4] for b in range(num)],
        min_p=[[0.0, 0.05][b % 2] for b in range(num)],
        seeds=[2**64 - 1 - 977 * b for b in range(num)],
        streams=[streams[b % len(streams)] for b in range(num)],
        positions=[31 * b + 8 for b in range(num)],
        starts=[31 * b + 6 if streams[b % len(streams)] > 0 else 0 for b in range(num)],
    )


def random_edits(vocab_size: int, seed: int) -> LogitEdits:
    """Some of everything, or all of it; tokens are few, so that bad words come about and tokens repeat."""
    rng = random.Random(seed)

    def ids(most: int, among: int = vocab_size) -> list[int]:
        return rng.sample(range(among), rng.randint(0, min(most, among)))

    biased, counted = ids(5), ids(20)
    words = [[rng.randrange(3) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(0, 6))]
    return LogitEdits(
        bias_ids=array("q", biased),
        biases=array("d", [rng.choice([-3.5, 2.25, float("-inf")]) for _ in biased]),
        end_ids=array("q", ids(2)),
        ends_banned=rng.randint(0, 3),
        word_starts=array("q", accumulate(map(len, words), initial=0)),
        word_tokens=array("q", [token for word in words for token in word]),
        recent=array("q", [rng.randrange(3) for _ in range(rng.randint(0, 2))]),
        counted_ids=array("q", counted),
        counts=array("q", [rng.randrange(4) for _ in counted]),
        repetition=rng.choice([1.0, 1.3, 0.7]),
        presence=rng.choice([0.0, 0.4]),
        frequency=rng.choice([0.0, 0.3, -0.2]),
    )
