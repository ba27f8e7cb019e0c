"""Counts what decoding reads from memory, and measures how fast the machine can read at all.

Decoding is bound by the weights it reads, so the least time of a step is its bytes over the read bandwidth.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec import Engine
from specdec.inspection.step_bytes import decoder_bytes
from specdec.kernels import AnyBackend
from specdec.model.layers import Decoder, DecoderRun

PROBE_BYTES = 2**30
PROBE_REPEATS = 3


def read_bandwidth(kernels: AnyBackend, num_bytes: int = PROBE_BYTES, repeats: int = PROBE_REPEATS) -> float:
    """Returns the bytes per second of reading `num_bytes` of memory once, on all threads; the best of `repeats`."""
    buffer = torch.zeros(num_bytes // 8, dtype=torch.int64)
    read = getattr(kernels, "read", Tensor.sum)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        read(buffer)
        times.append(time.perf_counter() - start)
    return buffer.nbytes / min(times)


@dataclass
class StepBytes:
    """What some forwards read."""

    weights: int = 0
    """Bytes of weights."""
    kv_cache: int = 0
    """Bytes of keys and values."""
    num_target_forwards: int = 0
    """Forwards of the target."""
    num_mtp_forwards: int = 0
    """Forwards of the MTP layer."""
    num_expert_reads: int = 0
    """Distinct experts, added up over layers and forwards."""
    num_layer_runs: int = 0
    """Layers with experts, added up over forwards."""

    def __sub__(self, other: StepBytes) -> StepBytes:
        return StepBytes(**{name: value - getattr(other, name) for name, value in vars(self).items()})

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.kv_cache


@contextmanager
def traced(engine: Engine) -> Iterator[StepBytes]:
    """Counts what the engine reads while the context is entered; the counts are there once it is left.

    Every forward is taken to read the head once, as decoding does; prefill that decides nothing reads less.
    """
    target, mtp = engine.runtime.model.target, engine.runtime.model.mtp
    counts = StepBytes()
    with ExitStack() as stack:
        target_runs = stack.enter_context(target.decoder.traced())
        mtp_runs = [] if mtp is None else stack.enter_context(mtp.decoder.traced())
        yield counts
    _count(engine, target.decoder, target_runs, counts)
    counts.num_target_forwards = len(target_runs)
    if mtp is not None:
        _count(engine, mtp.decoder, mtp_runs, counts)
        counts.num_mtp_forwards = len(mtp_runs)


def _count(engine: Engine, decoder: Decoder, runs: list[DecoderRun], counts: StepBytes) -> None:
    kernels, kv_cache = decoder.kernels, engine.runtime.kv_cache
    head = kernels.num_bytes(engine.runtime.model.target.head)
    kv_row = kv_cache[0, 0].nbytes // kv_cache.shape[3]
    sizes = decoder_bytes(decoder)
    for run in runs:
        distinct = [len(ids.unique()) if size else 0 for size, ids in zip(sizes.expert, run.expert_ids)]
        counts.weights += head + int(sizes.read(run.expert_ids.shape[1], distinct))
        counts.kv_cache += sum(run.kv_lens) * kv_row * len(decoder.weights.layers)
        counts.num_expert_reads += sum(distinct)
        counts.num_layer_runs += sum(size > 0 for size in sizes.expert)


def describe(samples: list[float]) -> tuple[float, float, float]:
    """Returns lower quartile, median and upper quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, median, high
