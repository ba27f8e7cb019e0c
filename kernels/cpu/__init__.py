"""C++ kernels for the CPU: each weight is read once for all rows, and a row's bits do not depend on its neighbours.

Weights are fp32, bf16 or int8, packed once at load; activations and accumulation are fp32.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, pointer
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.cpu import native
from specdec.kernels.cpu.native import NativeTime
from specdec.kernels.cpu.weights import (
    DTYPES,
    LANES,
    PackedWeight,
    PreparedDecoder,
    address,
    blocks,
    mlp_struct,
    pack,
    pack_gate_up,
    routing_struct,
)
from specdec.kernels.interface import (
    AttentionMetadata,
    DecoderOutput,
    DecoderWeights,
    DraftChain,
    DraftSampling,
    Residuals,
    RoutingConfig,
    RowSampling,
    flat_page_tables,
)

_num_threads = torch.get_num_threads


class CpuKernels:
    """The C++ backend; see `specdec.kernels.interface.Kernels` for the contracts."""

    name = "cpu"
    activation_dtype = torch.float32
    cache_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def __init__(
        self, weight_dtype: torch.dtype, load_dtype: torch.dtype = torch.bfloat16, architecture: str = "native"
    ) -> None:
        """weight_dtype: float32, bfloat16, or int8, which is quantised from load_dtype, per output channel.
        architecture: what the compiler builds for; results do not depend on it.

        Raises KernelsUnavailableError, and ValueError for another dtype.
        """
        if weight_dtype not in DTYPES:
            raise ValueError(f"kernels='cpu' have weights in float32, bfloat16 or int8, not {weight_dtype}")
        self.device, self.weight_dtype = torch.device("cpu"), weight_dtype
        self.dtype = load_dtype if weight_dtype == torch.int8 else weight_dtype
        self._library: Any = native.load_library(architecture)

    def pack(self, weight: Tensor, *, full_precision: bool = False) -> PackedWeight:
        return pack(self._library, weight, weight.dtype if full_precision else self.weight_dtype)

    def pack_gate_up(self, weight: Tensor) -> PackedWeight:
        return pack_gate_up(self._library, weight, self.weight_dtype)

    def num_bytes(self, packed: PackedWeight) -> int:
        return packed.data.nbytes + (0 if packed.scales is None else packed.scales.nbytes)

    def prepare(self, decoder: DecoderWeights) -> PreparedDecoder:
        return PreparedDecoder(decoder)

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        x = x.contiguous()
        y = torch.empty(x.shape[0], blocks(weight.shape[0]) * LANES)
        self._library.sd_linear(
            byref(weight.matrix(bias)), x.data_ptr(), x.shape[0], y.data_ptr(), y.shape[1], _num_threads()
        )
        return _cut(y, weight.shape[0])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        size = x.shape[-1]
        self._library.sd_rms_norm(
            x.data_ptr(), weight.data_ptr(), eps, x.numel() // size, size, y.data_ptr(), _num_threads()
        )
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        y, total = torch.empty_like(x), torch.empty_like(x)
        self._library.sd_add_rms_norm(
            x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, x.shape[0], x.shape[1], y.data_ptr(),
            total.data_ptr(), _num_threads(),
        )  # fmt: skip
        return y, total

    def rope_(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        for x in (q, k):
            assert x.stride()[1:] == (x.shape[2], 1), "heads lie side by side"
            self._library.sd_rope(
                x.data_ptr(), *x.shape, x.stride(0), positions.data_ptr(), cos_sin.data_ptr(), cos_sin.shape[1],
                _num_threads(),
            )  # fmt: skip

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, both = gate_up.shape
        y = torch.empty(rows, both // 2)
        self._library.sd_silu_and_mul(gate_up.data_ptr(), rows, both // 2, y.data_ptr(), _num_threads())
        return y

    def route(self, router_logits: Tensor, correction_bias: Tensor, config: RoutingConfig) -> tuple[Tensor, Tensor]:
        logits = router_logits.contiguous()
        rows, k = logits.shape[0], config.num_experts_per_tok
        ids, weights = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k)
        self._library.sd_route(
            logits.data_ptr(), correction_bias.data_ptr(), rows, byref(routing_struct(config, logits.shape[1])),
            ids.data_ptr(), weights.data_ptr(), _num_threads(),
        )  # fmt: skip
        return ids, weights

    def mlp(self, x: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
        x = x.contiguous()
        y = torch.empty(x.shape[0], blocks(x.shape[1]) * LANES)
        self._library.sd_mlp(byref(mlp_struct(gate_up, down)), x.data_ptr(), x.shape[0], y.data_ptr(), _num_threads())
        return _cut(y, x.shape[1])

    def moe(
        self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: PackedWeight, down: PackedWeight
    ) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        self._library.sd_moe(
            byref(mlp_struct(gate_up, down)), down.shape[0], x.data_ptr(), expert_ids.data_ptr(),
            expert_weights.data_ptr(), *expert_ids.shape, y.data_ptr(), _num_threads(),
        )  # fmt: skip
        return y

    def append_kv(self, k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        self._library.sd_append(
            byref(_cache(kv_cache)), k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), slot_mapping.data_ptr(),
            len(slot_mapping),
        )  # fmt: skip

    def paged_attention(self, q: Tensor, kv_cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        out = torch.empty(q.shape)
        self._library.sd_attention(
            byref(_cache(kv_cache)), byref(_batch(metadata)), q.shape[1], q.data_ptr(), q.stride(0), out.data_ptr(),
            _num_threads(),
        )  # fmt: skip
        return out

    def decode(
        self,
        decoder: PreparedDecoder,
        input_ids: Tensor,
        previous: Tensor | None,
        positions: Tensor,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        expert_ids: Tensor | None = None,
    ) -> DecoderOutput:
        assert (previous is None) == (decoder.weights.fusion is None), "previous states and a fusion belong together"
        previous = None if previous is None else previous.contiguous()
        num_rows = input_ids.shape[0]
        shape = (num_rows, decoder.hidden_size)
        normed, unnormed = torch.empty(shape), torch.empty(shape)
        forward = native.Forward(
            num_rows, input_ids.data_ptr(), positions.data_ptr(), metadata.slot_mapping.data_ptr(),
            address(previous), _batch(metadata), _cache(kv_cache), kv_cache.stride(0), normed.data_ptr(),
            unnormed.data_ptr(), address(expert_ids),
        )  # fmt: skip
        self._library.sd_decode(byref(decoder.struct), byref(forward), _num_threads())
        return DecoderOutput(normed, unnormed)

    def draft_chain(
        self, decoder: PreparedDecoder, head: PackedWeight, chain: DraftChain, expert_ids: Tensor | None = None
    ) -> Tensor:
        num, steps = len(chain.counts), max(chain.counts)
        ints = array("q", chain.counts + chain.positions + flat_page_tables(chain.page_tables))
        counts_at = _at(ints)
        drafts = torch.empty(num, steps, dtype=torch.int64)
        normed = chain.last.normed.contiguous()
        recycled = chain.last.unnormed.contiguous() if chain.recycle_unnormed else normed
        sampling = None if chain.sampling is None else pointer(_draft_sampling(chain.sampling))
        struct = native.Chain(
            num, steps, counts_at, counts_at + 8 * num, counts_at + 16 * num, counts_at + 24 * num + 8,
            _cache(chain.kv_cache), normed.data_ptr(), recycled.data_ptr(), chain.recycle_unnormed, sampling,
            drafts.data_ptr(), address(expert_ids),
        )  # fmt: skip
        self._library.sd_draft_chain(byref(decoder.struct), byref(head.unbiased), byref(struct), _num_threads())
        return drafts

    def head_argmax(self, x: Tensor, head: PackedWeight) -> Tensor:
        x = x.contiguous()
        ids = torch.empty(x.shape[0], dtype=torch.int64)
        self._library.sd_head_argmax(byref(head.unbiased), x.data_ptr(), x.shape[0], ids.data_ptr(), _num_threads())
        return ids

    def truncate_(self, logits: Tensor, sampling: RowSampling) -> None:
        assert logits.is_contiguous()
        assert logits.dtype == torch.float32
        self._library.sd_truncate(logits.data_ptr(), byref(_sampling(sampling)), logits.shape[1], _num_threads())

    def choose(self, logits: Tensor, sampling: RowSampling) -> Tensor:
        logits = logits.contiguous()
        ids = torch.empty(len(logits), dtype=torch.int64)
        self._library.sd_choose(
            logits.data_ptr(), byref(_sampling(sampling)), logits.shape[1], ids.data_ptr(), _num_threads()
        )
        return ids

    def softmax(self, logits: Tensor, scales: list[float]) -> Tensor:
        logits, reals = logits.contiguous(), array("d", scales)
        probs = torch.empty_like(logits)
        self._library.sd_softmax(logits.data_ptr(), _at(reals), *logits.shape, probs.data_ptr(), _num_threads())
        return probs

    def residual_mass(self, laws: Residuals) -> list[float]:
        masses = array("d", bytes(8 * len(laws.scales)))
        self._library.sd_residual_mass(byref(_residuals(laws)), _at(masses), _num_threads())
        return masses.tolist()

    def sample_residual(self, laws: Residuals, uniforms: list[float]) -> list[int]:
        reals, ids = array("d", uniforms), array("q", bytes(8 * len(uniforms)))
        self._library.sd_sample_residual(byref(_residuals(laws)), _at(reals), _at(ids), _num_threads())
        return ids.tolist()

    def uniforms(self, seeds: list[int], stream: int, positions: list[int], starts: list[int]) -> list[float]:
        num, keys, ints = len(seeds), array("Q", seeds), array("q", positions + starts)
        uniforms, at = array("d", bytes(8 * num)), _at(ints)
        self._library.sd_uniforms(_at(keys), stream, at, at + 8 * num, num, _at(uniforms))
        return uniforms.tolist()

    def read(self, buffer: Tensor) -> None:
        """Reads every byte of a contiguous tensor once, on all threads: a probe of the memory's bandwidth."""
        result = torch.empty(1, dtype=torch.int64)
        self._library.sd_read(buffer.data_ptr(), buffer.nbytes // 8, result.data_ptr(), _num_threads())

    @contextmanager
    def timed(self) -> Iterator[NativeTime]:
        """Adds up the time spent in the C++ library while it is entered."""
        library, time = self._library, NativeTime()
        self._library = native.TimedLibrary(library, time)
        try:
            yield time
        finally:
            self._library = library


def _cut(y: Tensor, size: int) -> Tensor:
    return y if size == y.shape[1] else y[:, :size].contiguous()


def _cache(kv_cache: Tensor) -> native.Cache:
    """[..., pages, 2, page_size, Hkv, D]: of one layer, or of the first of several."""
    assert kv_cache.is_contiguous()
    return native.Cache(kv_cache.data_ptr(), DTYPES[kv_cache.dtype], *kv_cache.shape[-3:])


def _batch(metadata: AttentionMetadata) -> native.Batch:
    num, starts = len(metadata.kv_lens), metadata.packed.buffer_info()[0]
    return native.Batch(num, starts, starts + 8 * (num + 1), starts + 8 * (2 * num + 1), starts + 8 * (3 * num + 2))


def _at(values: array[Any]) -> int:
    return values.buffer_info()[0]


def _sampling(sampling: RowSampling) -> native.Sampling:
    reals, ints, seeds = sampling.packed
    return native.Sampling(len(seeds), _at(reals), _at(ints), _at(seeds))


def _draft_sampling(sampling: DraftSampling) -> native.DraftSampling:
    rows, probs = _sampling(sampling.rows), sampling.probs
    assert probs is None or probs.is_contiguous()
    confidence = array("d", sampling.min_confidence)
    prob_rows = array("q", sampling.prob_rows if probs is not None else [-1] * len(confidence))
    struct = native.DraftSampling(
        rows, _at(confidence), _at(prob_rows), address(probs), 0 if probs is None else probs.shape[1]
    )
    struct.arrays = confidence, prob_rows  # they live as long
    return struct


def _residuals(laws: Residuals) -> native.Residuals:
    assert laws.p.is_contiguous()
    assert laws.q is None or laws.q.is_contiguous()
    scales, ints = array("d", laws.scales), array("q", laws.p_rows + laws.q_rows + laws.excluded)
    struct = native.Residuals(len(scales), laws.p.shape[-1], laws.p.data_ptr(), address(laws.q), _at(scales), _at(ints))
    struct.arrays = scales, ints
    return struct
