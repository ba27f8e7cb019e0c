"""C++ kernels for the CPU: each weight is read once for all rows, and a row's bits do not depend on its neighbours.

Weights are fp32, bf16 or int8, packed once at load; activations and accumulation are fp32.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import addressof, byref, pointer
from itertools import accumulate
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
    cache_struct,
    mlp_struct,
    pack,
    pack_gate_up,
    routing_struct,
)
from specdec.kernels.data import (
    NOT_DRAFTED,
    AttentionMetadata,
    ChainSampling,
    DecoderOutput,
    DecoderWeights,
    DraftChain,
    Drafts,
    HiddenRows,
    LogitEdits,
    Residuals,
    RoutingConfig,
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
        """weight_dtype: float32, bfloat16, or int8, which is quantised from load_dtype, per output channel.
        architecture: what the compiler builds for; results do not depend on it.
        progress: hears of the compilation, if there is one.

        Raises KernelsUnavailableError, and ValueError for another dtype.
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
        out, packed = torch.empty(q.shape), metadata.packed()
        self._library.sd_attention(
            byref(cache_struct(kv_cache)), byref(_batch(len(metadata.kv_lens), packed)), q.shape[1], q.data_ptr(),
            q.stride(0), out.data_ptr(), _num_threads(),
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
        tokens, shape = array("q", input_ids), (len(input_ids), decoder.hidden_size)
        normed, unnormed = torch.empty(shape), torch.empty(shape)
        forward, _alive = _forward(decoder, tokens, previous, metadata, kv_cache, expert_ids)
        forward.normed, forward.unnormed = normed.data_ptr(), unnormed.data_ptr()
        self._library.sd_decode(byref(decoder.struct), byref(forward), _num_threads())
        return DecoderOutput(normed, unnormed)

    def draft_chain(
        self, decoder: PreparedDecoder, head: PackedWeight, chain: DraftChain, expert_ids: Tensor | None = None
    ) -> Drafts:
        num, steps, sampling = len(chain.counts), max(chain.counts), chain.sampling
        tokens, counts = array("q", chain.input_ids), array("q", chain.counts)
        drafts = array("q", bytes(8 * num * steps))
        probs, prob_rows = None, [-1] * num
        if sampling is not None and steps:
            probs, prob_rows = room_for_probs(sampling.keep_probs, steps, head.shape[0], torch.float32, self.device)
        how = None if sampling is None else pointer(_chain_sampling(sampling, probs, prob_rows))
        pairs, _alive = _forward(decoder, tokens, chain.previous, chain.metadata, chain.kv_cache, expert_ids)
        struct = native.Chain(pairs, steps, _at(counts), chain.recycle_unnormed, how, _at(drafts))
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
        tokens, hidden = array("q", batch.place(input_ids)), torch.empty(len(input_ids), decoder.hidden_size)
        forward, _alive = _forward(decoder, tokens, None, metadata, kv_cache, expert_ids)
        forward.normed = hidden.data_ptr()
        drafts, num = batch.drafts, len(batch.rules)
        starts = [0, *accumulate(map(len, drafts.token_ids))]
        num_rows, size = starts[-1] + num, head.shape[0]
        ints = array("q", batch.rules + batch.first_rows + starts + drafts.prob_rows)
        for row in drafts.token_ids:
            ints.extend(row)
        emitted = array("q", bytes(8 * (num_rows + num)))
        raw, processed = (torch.empty(num_rows, size) for _ in range(2)) if batch.keep_logits else (None, None)
        rows, edits, probs, at, to = _sampling(batch.rows), _edits(batch.edits), drafts.probs, _at(ints), _at(emitted)
        struct = native.Verification(
            rows, at, at + 8 * num, at + 16 * num, at + 24 * num + 8, at + 32 * num + 8, address(probs),
            0 if probs is None else probs.shape[1], _start(edits), address(raw), address(processed), to,
            to + 8 * num_rows,
        )  # fmt: skip
        self._library.sd_verify(
            byref(decoder.struct), byref(head.unbiased), byref(forward), byref(struct), _num_threads()
        )
        firsts = [start + b for b, start in enumerate(starts)]
        token_ids = [emitted[first : first + count].tolist() for first, count in zip(firsts, emitted[num_rows:])]
        return Verified(hidden, token_ids, drafts.token_ids, raw, processed)

    def compute_logits(self, hidden: Tensor, head: PackedWeight) -> Tensor:
        return self.linear(hidden, head)

    def head_argmax(self, x: Tensor, head: PackedWeight) -> Tensor:
        x = x.contiguous()
        ids = torch.empty(x.shape[0], dtype=torch.int64)
        self._library.sd_head_argmax(byref(head.unbiased), x.data_ptr(), x.shape[0], ids.data_ptr(), _num_threads())
        return ids

    def edit_(self, logits: Tensor, edits: list[LogitEdits | None], drafts: list[list[int]]) -> None:
        assert logits.is_contiguous()
        structs = _edits(edits)
        if structs is None:
            return
        starts = array("q", [0, *accumulate(map(len, drafts))])
        tokens = array("q", [token for row in drafts for token in row])
        self._library.sd_edit(logits.data_ptr(), _start(structs), _at(starts), _at(tokens), *logits.shape)

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


def _batch(num: int, packed: array[int]) -> native.Batch:
    starts = _at(packed)
    return native.Batch(num, starts, starts + 8 * (num + 1), starts + 8 * (2 * num + 1), starts + 8 * (3 * num + 2))


def _at(values: array[Any]) -> int:
    return values.buffer_info()[0]


def _sampling(sampling: RowSampling) -> native.Sampling:
    arrays = reals, ints, seeds = sampling.packed()
    struct = native.Sampling(len(seeds), _at(reals), _at(ints), _at(seeds))
    struct.arrays = arrays  # they live as long
    return struct


def _forward(
    decoder: PreparedDecoder,
    tokens: array[int],
    previous: list[HiddenRows] | None,
    metadata: AttentionMetadata,
    kv_cache: Tensor,
    expert_ids: Tensor | None,
) -> tuple[native.Forward, object]:
    """What a forward reads, where its output goes left out; and what must live as long."""
    assert (previous is None) == (decoder.weights.fusion is None), "previous states and a fusion belong together"
    packed, rows = metadata.packed(), None if previous is None else _row_addresses(previous)
    batch = _batch(len(metadata.kv_lens), packed)
    forward = native.Forward(
        len(tokens), _at(tokens), None if rows is None else _at(rows), batch, *decoder.bind(kv_cache), None, None,
        address(expert_ids),
    )  # fmt: skip
    return forward, (packed, rows)


def _row_addresses(previous: list[HiddenRows]) -> array[int]:
    addresses = array("q")
    for hidden, first, count in previous:
        assert hidden.is_contiguous()
        size = 4 * hidden.shape[1]
        start = hidden.data_ptr() + first * size
        addresses.extend(range(start, start + count * size, size))
    return addresses


def _edits(edits: list[LogitEdits | None]) -> Any:
    """An array of structures, which the edits must outlive; or None where there is nothing to do."""
    if not any(edits):
        return None
    return (native.Edits * len(edits))(*(_EDIT_NOTHING if e is None else _edit_struct(e) for e in edits))


def _start(structs: Any) -> int | None:
    return None if structs is None else addressof(structs)


_EDIT_NOTHING = native.Edits()


def _edit_struct(e: LogitEdits) -> native.Edits:
    return native.Edits(
        len(e.bias_ids), _at(e.bias_ids), _at(e.biases), len(e.end_ids), e.ends_banned, _at(e.end_ids),
        len(e.word_starts) - 1, _at(e.word_starts), _at(e.word_tokens), len(e.recent), _at(e.recent),
        len(e.counted_ids), _at(e.counted_ids), _at(e.counts), e.repetition, e.presence, e.frequency,
    )  # fmt: skip


def _chain_sampling(sampling: ChainSampling, probs: Tensor | None, prob_rows: list[int]) -> native.DraftSampling:
    rows, edits = _sampling(sampling.rows), _edits(sampling.edits)
    confidence, row_of = array("d", sampling.min_confidence), array("q", prob_rows)
    struct = native.DraftSampling(
        rows, _at(confidence), _at(row_of), address(probs), 0 if probs is None else probs.shape[1], _start(edits),
    )  # fmt: skip
    struct.arrays = rows.arrays, confidence, row_of, edits  # they live as long
    return struct


def _residuals(laws: Residuals) -> native.Residuals:
    assert laws.p.is_contiguous()
    assert laws.q is None or laws.q.is_contiguous()
    scales, ints = array("d", laws.scales), array("q", laws.p_rows + laws.q_rows + laws.excluded)
    struct = native.Residuals(len(scales), laws.p.shape[-1], laws.p.data_ptr(), address(laws.q), _at(scales), _at(ints))
    struct.arrays = scales, ints
    return struct
