"""CUDA graphs of a decoder's forward: recorded once for a fixed shape, replayed on what lies in their buffers.

Attention is planned outside, before a replay, and only where a sequence's number of pages has changed: the plan splits
contexts over the GPU by pages alone. See docs/gpu.md, "CUDA graphs".

Shapes: T packed tokens, B sequences, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.data import AttentionMetadata, DecoderOutput, DecoderWeights
from specdec.kernels.decoder import ForwardInputs
from specdec.kernels.flashinfer.pages import FixedBatch
from specdec.kernels.flashinfer.planner import AttentionShape, Planner
from specdec.kernels.flashinfer.transfer import pinned, upload

Forward = Callable[[DecoderWeights, ForwardInputs, Tensor], DecoderOutput]


class CapturedForward:
    """A recorded forward of num_seqs sequences with query_len rows each. Smaller batches are filled up with padding on
    the scratch page."""

    @torch.inference_mode(False)  # its buffers live on after a caller's inference mode
    def __init__(
        self,
        forward: Forward,
        decoder: DecoderWeights,
        kv_cache: Tensor,
        planner: Planner,
        pool: Any,
        *,
        num_seqs: int,
        query_len: int,
        max_model_len: int,
    ) -> None:
        """Records a forward.

        forward: runs a decoder's layers.
        decoder: the decoder's weights.
        kv_cache: [layers, pages, 2, page_size, Hkv, D], its last page for scratch.
        planner: plans the attention.
        pool: memory that graphs share, from `torch.cuda.graph_pool_handle`.
        num_seqs, query_len: the shape that is recorded.
        max_model_len: the most tokens of a sequence.
        """
        self.num_seqs, self.query_len, self._kv_cache = num_seqs, query_len, kv_cache
        self._shape = AttentionShape.of(decoder.shape.num_heads, kv_cache)
        num_rows, size = num_seqs * query_len, self._shape.page_size
        max_pages = num_seqs * (-(-max_model_len // size) + -(-query_len // size))
        parts = [num_rows, num_rows, num_seqs, max_pages]
        self._numbers = torch.zeros(sum(parts), dtype=torch.int32, device=planner.device)
        positions, slots, last_page_len, self._indices = self._numbers.split(parts)
        indptr = torch.zeros(num_seqs + 1, dtype=torch.int32, device=planner.device)
        self._wrapper = planner.for_graph(indptr, self._indices, last_page_len)
        self._planned: list[int] = []  # the indptr that the wrapper's plan was made for, and that it has in its buffer
        hidden = decoder.embedding.new_zeros(num_rows, decoder.embedding.shape[1])
        self._inputs = ForwardInputs(
            tokens=torch.zeros(num_rows, dtype=torch.int32, device=planner.device),
            positions=positions,
            slots=slots,
            previous=None if decoder.fusion is None else hidden,
            attention=self._wrapper,
        )
        self._prepare(AttentionMetadata([], [], [], size))
        forward(decoder, self._inputs, kv_cache)  # whatever is compiled, tuned or allocated once
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = forward(decoder, self._inputs, kv_cache)

    def run(self, tokens: Tensor, previous: Tensor | None, metadata: AttentionMetadata) -> DecoderOutput:
        """Replays the forward for tokens [T] int32 and previous states [T, H]; returns outputs [T, H], which the next
        replay leaves as they are."""
        rows = upload(self._prepare(metadata).rows, tokens.device, torch.int64)
        self._inputs.tokens.index_copy_(0, rows, tokens)
        if self._inputs.previous is not None and previous is not None:
            self._inputs.previous.index_copy_(0, rows, previous)
        self._graph.replay()
        return DecoderOutput(*(x.index_select(0, rows) for x in self._output))

    def _prepare(self, metadata: AttentionMetadata) -> FixedBatch:
        """Copies what the graph reads into its buffers, and plans anew where the last plan does not fit."""
        batch = FixedBatch.fill(metadata, self.num_seqs, self.query_len, self._kv_cache.shape[1] - 1)
        pages = batch.pages
        numbers = pinned(batch.positions + batch.slots + pages.last_page_len + pages.indices)
        self._numbers[: len(numbers)].copy_(numbers, non_blocking=True)
        if pages.indptr != self._planned:
            indices = self._indices[: len(pages.indices)]
            page_table = pinned(pages.indptr), indices, pinned(pages.last_page_len)
            self._wrapper.plan(self._shape, *page_table, q_len_per_req=self.query_len)
            self._planned = pages.indptr
        return batch


class DecoderGraphs:
    """A decoder's recorded forwards over one cache. Several of one shape take turns, so that one can be prepared while
    the one before still runs."""

    def __init__(self, kv_cache: Tensor) -> None:
        self._cache_address = kv_cache.data_ptr()
        self._by_shape: dict[tuple[int, int], list[CapturedForward]] = {}

    def add(self, captured: CapturedForward) -> None:
        self._by_shape.setdefault((captured.query_len, captured.num_seqs), []).append(captured)

    def find(self, metadata: AttentionMetadata, kv_cache: Tensor) -> CapturedForward | None:
        """Returns the smallest that holds the batch (the fewest rows per sequence, then the fewest sequences); None
        where none does, or where they were recorded over another cache."""
        if kv_cache.data_ptr() != self._cache_address:
            return None
        longest, num = max(metadata.query_lens), len(metadata.query_lens)
        fitting = [shape for shape in self._by_shape if shape[0] >= longest and shape[1] >= num]
        if not fitting:
            return None
        in_turn = self._by_shape[min(fitting)]
        in_turn.append(in_turn.pop(0))
        return in_turn[-1]


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Returns the batch sizes to record: powers of two, and the largest batch there is."""
    sizes = [2**i for i in range(max_num_seqs.bit_length()) if 2**i < max_num_seqs]
    return [*sizes, max_num_seqs]
