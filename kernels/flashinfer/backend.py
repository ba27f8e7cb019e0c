"""`FlashInferKernels`: bf16 on one CUDA device.

A step's forwards are planned and launched, or replayed from CUDA graphs, without waiting for the device, and so are its
decisions: argmaxes by torch (`argmax`), all others by Triton (`sampled`). What `verify` reads at its end is the one
wait. (A chain of more drafts than graphs were captured for waits for its plans, too, and one whose experts are traced
for its drafts.)

Shapes: T packed tokens, B sequences, K draft tokens, V vocabulary, H hidden, D head_dim, Hq/Hkv query/KV heads.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from flashinfer.activation import silu_and_mul
from flashinfer.norm import fused_add_rmsnorm, rmsnorm
from flashinfer.page import append_paged_kv_cache
from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace
from torch import Tensor

from specdec.kernels import speculation
from specdec.kernels.data import AttentionMetadata, DecoderOutput, DecoderWeights, HiddenRows
from specdec.kernels.decisions import DraftChain, Drafts, Verified, VerifyBatch
from specdec.kernels.decoder import ForwardInputs, run_layers
from specdec.kernels.flashinfer import argmax, drafts, sampled
from specdec.kernels.flashinfer.argmax import ArgmaxDraws
from specdec.kernels.flashinfer.chain import Draws, device_chain
from specdec.kernels.flashinfer.experts import Experts, GroupedExperts, experts_for
from specdec.kernels.flashinfer.graphs import CapturedForward, DecoderGraphs, batch_sizes
from specdec.kernels.flashinfer.kept import Kept
from specdec.kernels.flashinfer.planner import AttentionShape, Planner, Wrapper
from specdec.kernels.flashinfer.requirements import fp8_kinds
from specdec.kernels.flashinfer.sampled import SampledDraws
from specdec.kernels.flashinfer.transfer import upload
from specdec.kernels.fp8 import Fp8Kind, Fp8Matrix, fp8_linear, plain
from specdec.kernels.progress import Progress, silent, tracked
from specdec.kernels.reference import ReferenceOperations
from specdec.kernels.triton import Decider, Drawer, TritonSampling

log = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)  # of FlashInfer's RoPE and attention


@dataclass(eq=False)
class PreparedDecoder:
    """A decoder as this backend reads it."""

    weights: DecoderWeights
    """Its weights, packed."""
    graphs: DecoderGraphs | None = None
    """Its recorded forwards; None before `FlashInferKernels.capture`."""


class FlashInferKernels(TritonSampling, ReferenceOperations):
    """The CUDA backend; see `specdec.kernels.backend.Backend` for the contracts.

    deciders, drawers: what decides verifications and draws drafts on the device, kept from step to step.
    """

    name = "flashinfer"
    cache_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    num_scratch_pages = 1  # where the padding of CUDA graphs is written

    def __init__(self, device: torch.device, experts: Experts, fp8: frozenset[Fp8Kind] = frozenset()) -> None:
        super().__init__(device, torch.bfloat16)
        self.dtype, self.fp8 = torch.bfloat16, fp8
        self.experts, self.planner = experts, Planner(device)
        self.deciders, self.drawers = Kept(Decider, device), Kept(Drawer, device)
        self._whole_caches: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def on(cls, device: torch.device) -> FlashInferKernels:
        """Returns the backend for a CUDA device, which becomes the process's current one: streams and events are that
        one's."""
        torch.cuda.set_device(device if device.index is not None else 0)
        capability = torch.cuda.get_device_capability(device)
        return cls(device, experts_for(capability), fp8_kinds(capability))

    def pack(self, weight: Tensor | Fp8Matrix, *, full_precision: bool = False) -> Any:
        return weight if self._keeps(weight) else plain(weight, self.dtype)

    def pack_gate_up(self, weight: Tensor | Fp8Matrix) -> Any:
        if self._keeps(weight):
            return weight
        weight = plain(weight, self.dtype)
        return self.experts.pack_gate_up(weight) if weight.dim() == 3 else weight

    def _keeps(self, weight: Tensor | Fp8Matrix) -> bool:
        if not isinstance(weight, Fp8Matrix):
            return False
        return ("experts" if weight.values.dim() == 3 else "linear") in self.fp8

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        return fp8_linear(x, weight, bias) if isinstance(weight, Fp8Matrix) else F.linear(x, weight, bias)

    def num_bytes(self, packed: Any) -> int:
        return int(packed.nbytes)

    def prepare(self, decoder: DecoderWeights) -> PreparedDecoder:
        head_dim = decoder.shape.head_dim
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim = {head_dim}: kernels = 'flashinfer' have {HEAD_DIMS}; use 'reference'")
        return PreparedDecoder(decoder)

    head_argmax = ReferenceOperations.head_argmax  # without packing anything

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rmsnorm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual

    def rope_(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        apply_rope_with_cos_sin_cache_inplace(positions, q.flatten(1), k.flatten(1), q.shape[-1], cos_sin)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return silu_and_mul(gate_up)

    def moe(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Any, down: Any) -> Tensor:
        experts = GroupedExperts() if isinstance(gate_up, Fp8Matrix) else self.experts
        return experts(x, expert_ids, expert_weights, gate_up, down)

    def append_kv(self, k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Writes k, v into their slots, see `Operations.append_kv`.

        FlashInfer is told that the whole cache is one sequence: its pages are all there are, its positions the slots.
        """
        no_batch = torch.zeros_like(slot_mapping, dtype=torch.int32)
        append_paged_kv_cache(k, v, no_batch, slot_mapping.int(), kv_cache, *self._whole_cache(kv_cache), "NHD")

    def _whole_cache(self, kv_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the page table of a sequence that owns all pages: indices, indptr, last_page_len."""
        num_pages, page_size = kv_cache.shape[0], kv_cache.shape[2]
        if (num_pages, page_size) not in self._whole_caches:
            self._whole_caches[num_pages, page_size] = (
                torch.arange(num_pages, dtype=torch.int32, device=self.device),
                upload([0, num_pages], self.device),
                upload([page_size], self.device),
            )
        return self._whole_caches[num_pages, page_size]

    def paged_attention(self, q: Tensor, kv_cache: Tensor, metadata: AttentionMetadata | Wrapper) -> Tensor:
        """Computes `Operations.paged_attention`. metadata: the forward's, or the wrapper that was planned for it, as a
        forward does once for all layers."""
        if isinstance(metadata, AttentionMetadata):
            metadata = self.planner.plan(metadata, AttentionShape.of(q.shape[1], kv_cache))
        return metadata.run(q, kv_cache)

    def run(
        self,
        decoder: PreparedDecoder,
        tokens: Tensor,
        previous: Tensor | None,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        expert_ids: Tensor | None = None,
    ) -> DecoderOutput:
        """Runs `decode` from tokens [T] int32 and previous states [T, H] that are on the device."""
        captured = None if decoder.graphs is None else decoder.graphs.find(metadata, kv_cache)
        if captured is not None and expert_ids is None:
            return captured.run(tokens, previous, metadata)
        positions, slots = upload(metadata.positions + metadata.slots, self.device).split(len(tokens))
        attention = self.planner.plan(metadata, AttentionShape.of(decoder.weights.shape.num_heads, kv_cache))
        inputs = ForwardInputs(tokens, positions, slots, previous, attention)
        return run_layers(self, decoder.weights, inputs, kv_cache, expert_ids)

    def decode(
        self,
        decoder: PreparedDecoder,
        input_ids: list[int],
        previous: list[HiddenRows] | None,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        expert_ids: Tensor | None = None,
    ) -> DecoderOutput:
        states = None if previous is None else torch.cat([rows.tensor() for rows in previous])
        return self.run(decoder, upload(input_ids, self.device), states, metadata, kv_cache, expert_ids)

    def draft_chain(
        self, decoder: PreparedDecoder, head: Tensor, chain: DraftChain, expert_ids: Tensor | None = None
    ) -> Drafts:
        if expert_ids is not None:
            return speculation.draft_chain(self, decoder, head, chain, expert_ids)

        def make_draws() -> Draws:
            return ArgmaxDraws(self, head, chain) if chain.sampling is None else SampledDraws(self, head, chain)

        return device_chain(self, decoder, chain, make_draws)

    def verify(
        self,
        decoder: PreparedDecoder,
        head: Tensor,
        input_ids: list[int],
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        batch: VerifyBatch,
        expert_ids: Tensor | None = None,
    ) -> Verified:
        tokens = upload(batch.place(input_ids), self.device)
        drafts.place_(tokens, batch)
        hidden = self.run(decoder, tokens, None, metadata, kv_cache, expert_ids).normed
        if not batch.rules:
            return Verified(hidden, [], [])
        decide = argmax.decide if argmax.decides(batch) else sampled.decide
        return decide(self, head, hidden, batch)

    def compute_logits(self, hidden: Tensor, head: Any) -> Tensor:
        return speculation.compute_logits(self, hidden, head)

    def capture(
        self,
        target: PreparedDecoder,
        mtp: PreparedDecoder | None,
        kv_cache: Tensor,
        *,
        max_num_seqs: int,
        draft_lengths: list[int],
        max_model_len: int,
        progress: Progress = silent,
    ) -> None:
        """Records CUDA graphs, see `CapturesGraphs`.

        The MTP layer's pairs of a step are up to 1 + K rows. Each later draft is one more row, and as many graphs of
        that shape take turns.
        """
        longest = max(draft_lengths, default=0)
        query_lens = sorted({1, *(length + 1 for length in draft_lengths)})
        wanted = [(target, kv_cache, num, n) for num in batch_sizes(max_num_seqs) for n in query_lens]
        target.graphs = DecoderGraphs(kv_cache)
        if mtp is not None and longest > 0:
            mtp.graphs = DecoderGraphs(kv_cache[-1:])
            for num in batch_sizes(max_num_seqs):
                wanted += [(mtp, kv_cache[-1:], num, n) for n in query_lens + [1] * (longest - 1)]
        pool, start_s = torch.cuda.graph_pool_handle(), time.perf_counter()
        wanted.sort(key=lambda w: -w[2] * w[3])  # the largest first: the smaller ones find room in its memory
        for decoder, cache, num_seqs, query_len in tracked(wanted, "capturing CUDA graphs", progress):
            assert decoder.graphs is not None
            captured = CapturedForward(
                self._forward, decoder.weights, cache, self.planner, pool,
                num_seqs=num_seqs, query_len=query_len, max_model_len=max_model_len,
            )  # fmt: skip
            decoder.graphs.add(captured)
        log.info("captured %d CUDA graphs in %.1f s", len(wanted), time.perf_counter() - start_s)

    def _forward(self, decoder: DecoderWeights, inputs: ForwardInputs, kv_cache: Tensor) -> DecoderOutput:
        return run_layers(self, decoder, inputs, kv_cache)
