"""Seconds and memory of forwards: the formulas of this package's docstring."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from specdec.eval.prediction.hardware import GPU
from specdec.eval.prediction.shapes import ModelShape, Precision

ACTIVATION_BYTES = 2  # bf16, between GPUs
MEMORY_SHARE = 0.9  # of a GPU's memory for weights and cache; the rest is for activations, graphs and the driver


@dataclass(frozen=True)
class Constants:
    """What no data sheet says; the same for all models and machines.

    bandwidth_share: eta_b. flops_share: eta_f. forward_s: t_0, of every forward: launch, sampling, host. layer_s:
    t_lat, of every layer: launches and dependencies that no bandwidth shortens. all_reduce_s: of one all-reduce,
    beside the time of its bytes.

    bandwidth_share and layer_s are the two that were fitted, to the points of `published` (`validation.fit`; a test
    holds them to it). forward_s was set by hand: between 0 and 0.5 ms it moves the median error by 3 points. Of
    all_reduce_s, about what a one-shot all-reduce of some KB takes over NVLink, the fit cannot say much, since nearly
    all points split over eight GPUs: more here would be less in layer_s. flops_share is usual for large matrix
    products; no published point is bound by arithmetic, so it is not validated.
    """

    bandwidth_share: float = 0.69
    flops_share: float = 0.6
    forward_s: float = 100e-6
    layer_s: float = 122e-6
    all_reduce_s: float = 10e-6


@dataclass(frozen=True)
class Machine:
    """split "tensor": every matrix over all GPUs, two all-reduces per layer. "layers": each GPU has some of the layers
    and waits while the others run, as in llama.cpp."""

    gpu: GPU
    num_gpus: int
    split: Literal["tensor", "layers"] = "tensor"

    @property
    def num_working(self) -> int:
        """GPUs that work at the same time."""
        return self.num_gpus if self.split == "tensor" else 1

    def __str__(self) -> str:
        return f"{self.num_gpus} x {self.gpu.name}" + (" in turn" if self.split == "layers" else "")


@dataclass(frozen=True)
class Work:
    """One forward. Bytes and operations of one GPU; those that work at the same time all do as much.

    read_bytes: weights, keys and values. all_reduce_bytes: that one GPU sends, of all `num_all_reduces` together.
    """

    read_bytes: float
    flops: float
    num_layers: int
    num_all_reduces: int
    all_reduce_bytes: float


@dataclass(frozen=True)
class Seconds:
    """Of one forward or several. `reading` and `arithmetic` overlap: the longer one counts."""

    reading: float
    arithmetic: float
    latency: float
    all_reduces: float

    @property
    def total(self) -> float:
        return max(self.reading, self.arithmetic) + self.latency + self.all_reduces


@dataclass(frozen=True)
class Iteration:
    """Seconds of its parts: verification (or plain decoding), draft extend, and all further draft steps."""

    target: Seconds
    extend_s: float
    steps_s: float

    @property
    def total_s(self) -> float:
        return self.target.total + self.extend_s + self.steps_s


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. available: `MEMORY_SHARE` of what it has."""

    weights: float
    kv_cache: float
    available: float


@dataclass(frozen=True)
class CostModel:
    """One model in one precision on one machine."""

    shape: ModelShape
    precision: Precision
    machine: Machine
    constants: Constants = Constants()

    def target(self, num_rows: float, batch_size: int, context_length: float) -> Work:
        """A target forward of `num_rows` over `batch_size` sequences, the head for every row."""
        shape = self.shape
        weights = shape.target_bytes(self.precision, shape.distinct_experts(num_rows))
        flops = num_rows * (shape.target_flops + shape.head_flops)
        return self._work(weights, flops, shape.num_layers, num_rows, batch_size, context_length)

    def mtp(self, num_rows: float, batch_size: int, context_length: float) -> Work:
        """An MTP forward of `num_rows`, the head for the last row of each sequence."""
        shape = self.shape
        weights = shape.mtp_bytes(self.precision, shape.distinct_experts(num_rows))
        flops = num_rows * shape.mtp_flops + batch_size * shape.head_flops
        return self._work(weights, flops, 1, num_rows, batch_size, context_length)

    def _work(
        self, weights: float, flops: float, num_layers: int, num_rows: float, batch_size: int, context_length: float
    ) -> Work:
        shape, gpus = self.shape, self.machine.num_working
        keys = batch_size * context_length * num_layers * shape.kv_values * self.precision.kv
        flops += num_rows * context_length * num_layers * shape.attention_flops
        num_all_reduces = 2 * num_layers if gpus > 1 else 0
        sent = 2 * (gpus - 1) / gpus * num_rows * shape.hidden_size * ACTIVATION_BYTES
        return Work(
            read_bytes=weights / gpus + keys / min(gpus, shape.kv_shards),
            flops=flops / gpus,
            num_layers=num_layers,
            num_all_reduces=num_all_reduces,
            all_reduce_bytes=num_all_reduces * sent,
        )

    def seconds(self, work: Work) -> Seconds:
        gpu, c = self.machine.gpu, self.constants
        return Seconds(
            reading=work.read_bytes / (c.bandwidth_share * gpu.bandwidth),
            arithmetic=work.flops / (c.flops_share * gpu.flops(self.precision.matmul)),
            latency=c.forward_s + work.num_layers * c.layer_s,
            all_reduces=work.num_all_reduces * c.all_reduce_s + work.all_reduce_bytes / gpu.link_bandwidth,
        )

    def forwards(self, batch_size: int, num_draft_tokens: int, length: float, context_length: float) -> list[Work]:
        """Of one iteration, the target's first. length: mean acceptance length, tokens per iteration and sequence."""
        forwards = [self.target(batch_size * (num_draft_tokens + 1), batch_size, context_length)]
        if num_draft_tokens:
            forwards.append(self.mtp(batch_size * length, batch_size, context_length))
            forwards += [self.mtp(batch_size, batch_size, context_length)] * (num_draft_tokens - 1)
        return forwards

    def iteration(self, batch_size: int, num_draft_tokens: int, length: float, context_length: float) -> Iteration:
        """See `forwards`."""
        target, *drafts = map(self.seconds, self.forwards(batch_size, num_draft_tokens, length, context_length))
        return Iteration(target, extend_s=sum(d.total for d in drafts[:1]), steps_s=sum(d.total for d in drafts[1:]))

    def tokens_per_s(self, batch_size: int, num_draft_tokens: int, length: float, context_length: float) -> float:
        """Of all sequences together."""
        return batch_size * length / self.iteration(batch_size, num_draft_tokens, length, context_length).total_s

    def memory(self, batch_size: int, context_length: float, with_mtp: bool) -> Memory:
        shape, gpus = self.shape, self.machine.num_gpus
        layers = shape.num_layers + with_mtp
        keys = batch_size * context_length * layers * shape.kv_values * self.precision.kv
        shards = gpus if self.machine.split == "layers" else min(gpus, shape.kv_shards)
        return Memory(
            weights=shape.weight_bytes(self.precision, with_mtp) / gpus,
            kv_cache=keys / shards,
            available=MEMORY_SHARE * self.machine.gpu.memory,
        )

    def max_batch_size(self, context_length: float, with_mtp: bool) -> int:
        """The most sequences that fit; 0 where not even one does."""
        memory = self.memory(1, context_length, with_mtp)
        return max(0, math.floor((memory.available - memory.weights) / memory.kv_cache))
