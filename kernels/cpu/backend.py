"""`CpuKernels`: a backend, and all single operations, by the C++ library."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, pointer
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.cpu import native
from specdec.kernels.cpu.native import NativeTime
from specdec.kernels.cpu.structs import (
    VerificationCall,
    at,
    batch_struct,
    draft_sampling_struct,
    edit_structs,
    edits_address,
    forward_struct,
    one_array,
    residuals_struct,
    sampling_struct,
    zeros,
)
from specdec.kernels.cpu.weights import (
    DTYPES,
    LANES,
    PackedWeight,
    PreparedDecoder,
    blocks,
    cache_struct,
    mlp_struct,
    pack,
    pack_gate_up,
    routing_struct,
)
from specdec.kernels.data import AttentionMetadata, DecoderOutput, DecoderWeights, HiddenRows, RoutingConfig
from specdec.kernels.decisions import (
    NOT_DRAFTED,
    DraftChain,
    Drafts,
    LogitEdits,
    Residuals,
    RowSampling,
    Verified,
    VerifyBatch,
    room_for_probs,
)
from specdec.kernels.fp8 import Fp8Kind, Fp8Matrix, plain
from specdec.kernels.progress import Progress, silent

_num_threads = torch.get_num_threads


class CpuKernels:
    """The C++ backend; see `specdec.kernels.backend.Backend` for the contracts."""

    name = "cpu"
    activation_dtype = torch.float32
    cache_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    fp8: frozenset[Fp8Kind] = frozenset()
    num_scratch_pages = 0

    def __init__(
        self,
        weight_dtype: torch.dtype,
        load_dtype: torch.dtype = torch.bfloat16,
        architecture: str = "native",
        progress: Progress = silent,
    ) -> None:
        """Loads the library, and compiles it first where need be.

        weight_dtype: float32, bfloat16, or int8, which is quantised from load_dtype, per output channel.
        load_dtype: dtype of matrices as they are loaded, where weight_dtype is int8.
        architecture: the compiler's -march; results do not depend on it.
        progress: hears of the compilation, if there is one.

        Raises KernelsUnavailableError where nothing can be compiled, ValueError for another dtype.
        """
        if weight_dtype not in DTYPES:
            raise ValueError(f"kernels='cpu' have weights in float32, bfloat16 or int8, not {weight_dtype}")
        self.device, self.weight_dtype = torch.device("cpu"), weight_dtype
        self.dtype = load_dtype if weight_dtype == torch.int8 else weight_dtype
        self._library: Any = native.load_library(architecture, progress)

    def pack(self, weight: Tensor | Fp8Matrix, *, full_precision: bool = False) -> PackedWeight:
        weight = plain(weight, self.dtype)
        return pack(self._library, weight, weight.dtype if full_precision else self.weight_dtype)

    def pack_gate_up(self, weight: Tensor | Fp8Matrix) -> PackedWeight:
        return pack_gate_up(self._library, plain(weight, self.dtype), self.weight_dtype)

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
            byref(cache_struct(kv_cache)), k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0),
            slot_mapping.data_ptr(), len(slot_mapping),
        )  # fmt: skip

    def paged_attention(self, q: Tensor, kv_cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        out = torch.empty(q.shape)
        self._library.sd_attention(
            byref(cache_struct(kv_cache)), byref(batch_struct(metadata)), q.shape[1], q.data_ptr(), q.stride(0),
            out.data_ptr(), _num_threads(),
        )  # fmt: skip
        return out

    def decode(
        self,
        decoder: PreparedDecoder,
        input_ids: list[int],
        previous: list[HiddenRows] | None,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        expert_ids: Tensor | None = None,
    ) -> DecoderOutput:
        shape = len(input_ids), decoder.hidden_size
        normed, unnormed = torch.empty(shape), torch.empty(shape)
        forward = forward_struct(decoder, input_ids, previous, metadata, kv_cache, expert_ids)
        forward.normed, forward.unnormed = normed.data_ptr(), unnormed.data_ptr()
        self._library.sd_decode(byref(decoder.struct), byref(forward), _num_threads())
        return DecoderOutput(normed, unnormed)

    def draft_chain(
        self, decoder: PreparedDecoder, head: PackedWeight, chain: DraftChain, expert_ids: Tensor | None = None
    ) -> Drafts:
        num, steps, sampling = len(chain.counts), max(chain.counts), chain.sampling
        counts, drafts = array("q", chain.counts), zeros(num * steps)
        probs, prob_rows = None, [-1] * num
        if sampling is not None and steps:
            probs, prob_rows = room_for_probs(sampling.keep_probs, steps, head.shape[0], torch.float32, self.device)
        how = None if sampling is None else pointer(draft_sampling_struct(sampling, probs, prob_rows))
        pairs = forward_struct(decoder, chain.input_ids, chain.previous, chain.metadata, chain.kv_cache, expert_ids)
        struct = native.Chain(pairs, steps, at(counts), chain.recycle_unnormed, how, at(drafts))
        self._library.sd_draft_chain(byref(decoder.struct), byref(head.unbiased), byref(struct), _num_threads())
        rows = (drafts[b * steps : (b + 1) * steps].tolist() for b in range(num))
        token_ids = [row[: row.index(NOT_DRAFTED)] if NOT_DRAFTED in row else row for row in rows]
        return Drafts(token_ids, prob_rows, probs)

    def verify(
        self,
        decoder: PreparedDecoder,
        head: PackedWeight,
        input_ids: list[int],
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        batch: VerifyBatch,
        expert_ids: Tensor | None = None,
    ) -> Verified:
        hidden = torch.empty(len(input_ids), decoder.hidden_size)
        forward = forward_struct(decoder, batch.place(input_ids), None, metadata, kv_cache, expert_ids)
        forward.normed = hidden.data_ptr()
        call = VerificationCall(batch, head.shape[0])
        self._library.sd_verify(
            byref(decoder.struct), byref(head.unbiased), byref(forward), byref(call.struct), _num_threads()
        )
        return Verified(hidden, call.token_ids(), batch.drafts.token_ids, call.raw, call.processed)

    def compute_logits(self, hidden: Tensor, head: PackedWeight) -> Tensor:
        return self.linear(hidden, head)

    def head_argmax(self, x: Tensor, head: PackedWeight) -> Tensor:
        x = x.contiguous()
        ids = torch.empty(x.shape[0], dtype=torch.int64)
        self._library.sd_head_argmax(byref(head.unbiased), x.data_ptr(), x.shape[0], ids.data_ptr(), _num_threads())
        return ids

    def edit_(self, logits: Tensor, edits: list[LogitEdits | None], drafts: list[list[int]]) -> None:
        assert logits.is_contiguous()
        structs = edit_structs(edits)
        if structs is None:
            return
        _ints, (starts, tokens) = one_array([0, *accumulate(map(len, drafts))], [*chain(*drafts)])
        self._library.sd_edit(logits.data_ptr(), edits_address(structs), starts, tokens, *logits.shape)

    def truncate_(self, logits: Tensor, sampling: RowSampling) -> None:
        assert logits.is_contiguous()
        assert logits.dtype == torch.float32
        self._library.sd_truncate(logits.data_ptr(), byref(sampling_struct(sampling)), logits.shape[1], _num_threads())

    def choose(self, logits: Tensor, sampling: RowSampling) -> Tensor:
        logits = logits.contiguous()
        ids = torch.empty(len(logits), dtype=torch.int64)
        self._library.sd_choose(
            logits.data_ptr(), byref(sampling_struct(sampling)), logits.shape[1], ids.data_ptr(), _num_threads()
        )
        return ids

    def softmax(self, logits: Tensor, scales: list[float]) -> Tensor:
        logits, reals = logits.contiguous(), array("d", scales)
        probs = torch.empty_like(logits)
        self._library.sd_softmax(logits.data_ptr(), at(reals), *logits.shape, probs.data_ptr(), _num_threads())
        return probs

    def residual_mass(self, laws: Residuals) -> list[float]:
        masses = array("d", bytes(8 * len(laws.scales)))
        self._library.sd_residual_mass(byref(residuals_struct(laws)), at(masses), _num_threads())
        return masses.tolist()

    def sample_residual(self, laws: Residuals, uniforms: list[float]) -> list[int]:
        reals, ids = array("d", uniforms), zeros(len(uniforms))
        self._library.sd_sample_residual(byref(residuals_struct(laws)), at(reals), at(ids), _num_threads())
        return ids.tolist()

    def uniforms(self, seeds: list[int], stream: int, positions: list[int], starts: list[int]) -> list[float]:
        keys, uniforms = array("Q", seeds), array("d", bytes(8 * len(seeds)))
        _ints, addresses = one_array(positions, starts)
        self._library.sd_uniforms(at(keys), stream, *addresses, len(seeds), at(uniforms))
        return uniforms.tolist()

    def read(self, buffer: Tensor) -> None:
        """Reads every byte of a contiguous tensor once, on all threads, to measure the memory's bandwidth."""
        result = torch.empty(1, dtype=torch.int64)
        self._library.sd_read(buffer.data_ptr(), buffer.nbytes // 8, result.data_ptr(), _num_threads())

    @contextmanager
    def timed(self) -> Iterator[NativeTime]:
        """Adds up the seconds spent in the C++ library while the context is entered."""
        library, time = self._library, NativeTime()
        self._library = native.TimedLibrary(library, time)
        try:
            yield time
        finally:
            self._library = library


def _cut(y: Tensor, size: int) -> Tensor:
    return y if size == y.shape[1] else y[:, :size].contiguous()
