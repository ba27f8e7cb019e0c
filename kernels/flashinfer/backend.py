"""`FlashInferKernels`: bf16 on one CUDA device.

A step's forwards are planned and launched, or replayed from CUDA graphs, without waiting for the device; what `verify`
reads at its end is the one wait. (A chain of more drafts than graphs were captured for waits for its plans, too.) So
far this holds where every decision is an argmax: temperature 0, no edits, no log-probabilities. The others still decide
with torch's reference operations, which wait for their numbers.

Shapes: T packed tokens, B sequences, K draft tokens, V vocabulary, H hidden, D head_dim, Hq/Hkv query/KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from flashinfer.activation import silu_and_mul
from flashinfer.norm import fused_add_rmsnorm, rmsnorm
from flashinfer.page import append_paged_kv_cache
from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace
from rich.console import Console
from rich.progress import track
from torch import Tensor

from specdec.kernels import composed, rules
from specdec.kernels.composed import ForwardInputs
from specdec.kernels.flashinfer.chain import greedy_chain
from specdec.kernels.flashinfer.experts import Experts, experts_for
from specdec.kernels.flashinfer.graphs import CapturedForward, DecoderGraphs, batch_sizes
from specdec.kernels.flashinfer.planner import AttentionShape, Planner, Wrapper
from specdec.kernels.flashinfer.transfer import upload
from specdec.kernels.interface import (
    EXACT_MATCH,
    GREEDY,
    AttentionMetadata,
    DecoderOutput,
    DecoderWeights,
    DraftChain,
    Drafts,
    HiddenRows,
    Verification,
    Verified,
)
from specdec.kernels.reference import ReferenceKernels

HEAD_DIMS = (64, 128, 256)  # of FlashInfer's RoPE and attention


@dataclass(eq=False)
class PreparedDecoder:
    """graphs: from `FlashInferKernels.capture` on."""

    weights: DecoderWeights
    graphs: DecoderGraphs | None = None


class FlashInferKernels(ReferenceKernels):
    """See `specdec.kernels.interface.Kernels` for the contracts. What decides tokens is the reference's."""

    name = "flashinfer"
    cache_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    num_scratch_pages = 1  # where the padding of CUDA graphs is written

    def __init__(self, device: torch.device, experts: Experts) -> None:
        super().__init__(device, torch.bfloat16)
        self.experts, self.planner = experts, Planner(device)
        self._whole_caches: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def on(cls, device: torch.device) -> FlashInferKernels:
        """A CUDA device, which becomes the process's current one: streams and events are that one's."""
        torch.cuda.set_device(device if device.index is not None else 0)
        return cls(device, experts_for(torch.cuda.get_device_capability(device)))

    def pack_gate_up(self, weight: Tensor) -> Tensor:
        return self.experts.pack_gate_up(weight) if weight.dim() == 3 else weight

    def prepare(self, decoder: DecoderWeights) -> PreparedDecoder:  # type: ignore[override]
        head_dim = decoder.shape.head_dim
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim = {head_dim}: kernels = 'flashinfer' have {HEAD_DIMS}; use 'reference'")
        return PreparedDecoder(decoder)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rmsnorm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual

    def rope_(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        apply_rope_with_cos_sin_cache_inplace(positions, q.flatten(1), k.flatten(1), q.shape[-1], cos_sin)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return silu_and_mul(gate_up)

    def moe(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return self.experts(x, expert_ids, expert_weights, gate_up, down)

    def append_kv(self, k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """To FlashInfer the whole cache is one sequence: its pages are all there are, its positions the slots."""
        no_batch = torch.zeros_like(slot_mapping, dtype=torch.int32)
        append_paged_kv_cache(k, v, no_batch, slot_mapping.int(), kv_cache, *self._whole_cache(kv_cache), "NHD")

    def _whole_cache(self, kv_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its page table: indices, indptr, last_page_len."""
        num_pages, page_size = kv_cache.shape[0], kv_cache.shape[2]
        if (num_pages, page_size) not in self._whole_caches:
            self._whole_caches[num_pages, page_size] = (
                torch.arange(num_pages, dtype=torch.int32, device=self.device),
                upload([0, num_pages], self.device),
                upload([page_size], self.device),
            )
        return self._whole_caches[num_pages, page_size]

    def paged_attention(self, q: Tensor, kv_cache: Tensor, metadata: AttentionMetadata | Wrapper) -> Tensor:
        """metadata: or what was planned for it, as a forward does once for all layers."""
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
        """`decode` from tokens [T] int32 and previous states [T, H] on the device."""
        captured = None if decoder.graphs is None else decoder.graphs.find(metadata, kv_cache)
        if captured is not None and expert_ids is None:
            return captured.run(tokens, previous, metadata)
        positions, slots = upload(metadata.positions + metadata.slots, self.device).split(len(tokens))
        attention = self.planner.plan(metadata, AttentionShape.of(decoder.weights.shape.num_heads, kv_cache))
        inputs = ForwardInputs(tokens, positions, slots, previous, attention)
        return composed.forward(self, decoder.weights, inputs, kv_cache, expert_ids)

    def decode(  # type: ignore[override]
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

    def draft_chain(  # type: ignore[override]
        self, decoder: PreparedDecoder, head: Tensor, chain: DraftChain, expert_ids: Tensor | None = None
    ) -> Drafts:
        if chain.sampling is None and expert_ids is None:
            return greedy_chain(self, decoder, head, chain)
        return composed.draft_chain(self, decoder, head, chain, expert_ids)

    def verify(  # type: ignore[override]
        self,
        decoder: PreparedDecoder,
        head: Tensor,
        input_ids: list[int],
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        verification: Verification,
        expert_ids: Tensor | None = None,
    ) -> Verified:
        tokens = upload(input_ids, self.device)
        _place_drafts_(tokens, verification)
        hidden = self.run(decoder, tokens, None, metadata, kv_cache, expert_ids).normed
        if not verification.rules:
            return Verified(hidden, [], None, None)
        if _takes_every_argmax(verification):
            return self._match_argmax(head, hidden, verification)
        known = _drafts_on_host(verification)
        return composed.decide(self, head, hidden, known)._replace(draft_token_ids=known.drafts)

    def _match_argmax(self, head: Tensor, hidden: Tensor, v: Verification) -> Verified:
        """The argmax of every row that decides, and drafts that are not known yet, in one reading."""
        num_rows = [len(drafts) + 1 for drafts in v.drafts]
        deciding = [first + i for first, n in zip(v.first_rows, num_rows) for i in range(n)]
        choices = self.head_argmax(hidden.index_select(0, upload(deciding, self.device)), head)
        drafts = choices.new_empty(0) if v.drafts_on_device is None else v.drafts_on_device.flatten()
        numbers = torch.cat([choices, drafts]).tolist()
        known = _fill_in(v, numbers[len(deciding) :])
        each = iter(numbers)
        token_ids = [rules.match_choices([next(each) for _ in range(n)], d) for n, d in zip(num_rows, known)]
        return Verified(hidden, token_ids, None, None, known)

    def capture(
        self,
        target: PreparedDecoder,
        mtp: PreparedDecoder | None,
        kv_cache: Tensor,
        *,
        max_num_seqs: int,
        num_draft_tokens: int,
        max_model_len: int,
    ) -> None:
        """See `CapturesGraphs`. The MTP layer's pairs of a step are up to 1 + K rows; each later draft is one more,
        and as many graphs of that shape take turns."""
        query_lens = sorted({1, num_draft_tokens + 1})
        wanted = [(target, kv_cache, num, n) for num in batch_sizes(max_num_seqs) for n in query_lens]
        target.graphs = DecoderGraphs(kv_cache)
        if mtp is not None and num_draft_tokens > 0:
            mtp.graphs = DecoderGraphs(kv_cache[-1:])
            for num in batch_sizes(max_num_seqs):
                wanted += [(mtp, kv_cache[-1:], num, n) for n in query_lens + [1] * (num_draft_tokens - 1)]
        pool = torch.cuda.graph_pool_handle()
        progress = Console(stderr=True)
        # The largest first: the smaller ones find room in its memory.
        for decoder, cache, num_seqs, query_len in track(
            sorted(wanted, key=lambda w: -w[2] * w[3]), "Capturing CUDA graphs", console=progress, transient=True
        ):
            assert decoder.graphs is not None
            captured = CapturedForward(
                self._forward, decoder.weights, cache, self.planner, pool,
                num_seqs=num_seqs, query_len=query_len, max_model_len=max_model_len,
            )  # fmt: skip
            decoder.graphs.add(captured)

    def _forward(self, decoder: DecoderWeights, inputs: ForwardInputs, kv_cache: Tensor) -> DecoderOutput:
        return composed.forward(self, decoder, inputs, kv_cache)


def _place_drafts_(tokens: Tensor, v: Verification) -> None:
    """Drafts that the host does not know yet, into their rows of tokens [T] int32."""
    if v.drafts_on_device is None:
        return
    num_steps = v.drafts_on_device.shape[1]
    places = [
        (first + 1 + i, row * num_steps + i)
        for first, row, drafts in zip(v.first_rows, v.draft_rows, v.drafts)
        for i in range(len(drafts))
    ]
    if places:
        to, source = upload([at for place in zip(*places) for at in place], tokens.device, torch.int64).chunk(2)
        tokens.index_copy_(0, to, v.drafts_on_device.flatten().index_select(0, source).clamp(min=0).int())


def _takes_every_argmax(v: Verification) -> bool:
    return not (
        v.keep_logits
        or any(v.edits)
        or any(rule != EXACT_MATCH for rule in v.rules)
        or any(stream != GREEDY for stream in v.rows.streams)
    )


def _drafts_on_host(v: Verification) -> Verification:
    """The same, with its drafts read from the device."""
    if v.drafts_on_device is None:
        return v
    return replace(v, drafts=_fill_in(v, v.drafts_on_device.flatten().tolist()), drafts_on_device=None)


def _fill_in(v: Verification, ids: list[int]) -> list[list[int]]:
    """Drafts of each sequence out of those that were on the device, row by row."""
    if v.drafts_on_device is None:
        return v.drafts
    starts = [row * v.drafts_on_device.shape[1] for row in v.draft_rows]
    return [ids[start : start + len(drafts)] for start, drafts in zip(starts, v.drafts)]
