"""Which FlashInfer wrapper runs the attention of a forward, and its plan: made once per forward, for all layers.

Shapes: T packed tokens, Hq/Hkv query/KV heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from specdec.kernels.data import AttentionMetadata
from specdec.kernels.flashinfer.pages import PageTable
from specdec.kernels.flashinfer.transfer import pinned, upload

# Partial results of long contexts that are split over the GPU: heads * rows * D * 4 bytes, at most two tiles of rows
# per multiprocessor and KV head. FlashInfer wants it zeroed before its first use.
SPLIT_BYTES = 256 * 2**20
# A plan's own arrays, about 13 bytes per row. FlashInfer's 8 MiB would be taken by each of many wrappers.
PLAN_BYTES = 2 * 2**20
# Up to here, rows of equal number are a decode step; more of them are a prompt.
MAX_DECODE_ROWS = 16
# A step's plans are at most its pairs, 8 drafts and the verification, and the host waits once per step.
NUM_IN_TURN = 10


@dataclass(frozen=True)
class AttentionShape:
    """What a plan needs to know beside lengths and pages."""

    num_heads: int
    """Query heads, Hq."""
    num_kv_heads: int
    """Key and value heads, Hkv."""
    head_dim: int
    """Size of a head, D."""
    page_size: int
    """Tokens of a page."""
    dtype: torch.dtype
    """Dtype of the cache, and of the queries."""

    @classmethod
    def of(cls, num_heads: int, kv_cache: Tensor) -> AttentionShape:
        """Returns the shape for a cache [..., pages, 2, page_size, Hkv, D]."""
        page_size, num_kv_heads, head_dim = kv_cache.shape[-3:]
        return cls(num_heads, num_kv_heads, head_dim, page_size, kv_cache.dtype)


class Wrapper:
    """One FlashInfer wrapper. It copies its plan to the device some time after `plan` has returned, so the next plan
    waits for that copy."""

    def __init__(self, wrapper: Any, workspace: Tensor) -> None:
        self.wrapper = wrapper
        wrapper.reset_workspace_buffer(workspace, workspace.new_empty(PLAN_BYTES))
        self._copied = torch.cuda.Event()

    def plan(self, shape: AttentionShape, *lengths_and_pages: Tensor, **how: Any) -> None:
        self._copied.synchronize()
        self.wrapper.plan(
            *lengths_and_pages, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.page_size,
            q_data_type=shape.dtype, kv_data_type=shape.dtype, sm_scale=shape.head_dim**-0.5, **how,
        )  # fmt: skip
        self._copied.record()

    def run(self, q: Tensor, kv_cache: Tensor) -> Tensor:
        """Returns the attention [T, Hq, D] of q [T, Hq, D] over one layer's cache, as planned."""
        return self.wrapper.run(q, kv_cache)


class Planner:
    """Wrappers for eager forwards, each kind in turn, over one workspace.

    Backend fa2 throughout: "auto" would take fa3 on an H100, which has neither q_len_per_req nor stable plans.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.workspace = torch.zeros(SPLIT_BYTES, dtype=torch.uint8, device=device)
        self._decode: list[Wrapper] = []
        self._prefill: list[Wrapper] = []

    def plan(self, metadata: AttentionMetadata, shape: AttentionShape) -> Wrapper:
        """Returns a wrapper that is ready for all layers of one forward."""
        pages = PageTable.of(metadata.kv_lens, metadata.page_tables, metadata.page_size)
        page_table = pinned(pages.indptr), upload(pages.indices, self.device), pinned(pages.last_page_len)
        query_len = metadata.query_lens[0]
        if query_len <= MAX_DECODE_ROWS and metadata.query_lens == [query_len] * len(metadata.query_lens):
            wrapper = self._next(self._decode, self._make_decode)
            wrapper.plan(shape, *page_table, q_len_per_req=query_len)
        else:
            wrapper = self._next(self._prefill, self._make_prefill)
            starts = pinned(metadata.query_starts)
            wrapper.plan(shape, starts, *page_table, causal=True)
        return wrapper

    def for_graph(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor) -> Wrapper:
        """Returns a wrapper whose runs read these buffers on the device.

        indptr [B + 1], indices [pages], last_page_len [B]: see `PageTable`; int32.
        """
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, "NHD", use_cuda_graph=True, use_tensor_cores=True, paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=indices, paged_kv_last_page_len_buffer=last_page_len, backend="fa2",
        )  # fmt: skip
        return Wrapper(wrapper, self.workspace)

    def _next(self, wrappers: list[Wrapper], make: Any) -> Wrapper:
        """Returns the wrapper whose plan is the oldest, or a new one while there are few."""
        wrapper = Wrapper(make(), self.workspace) if len(wrappers) < NUM_IN_TURN else wrappers.pop(0)
        wrappers.append(wrapper)
        return wrapper

    @torch.inference_mode(False)  # they live on after a caller's inference mode
    def _make_decode(self) -> Any:
        return BatchDecodeWithPagedKVCacheWrapper(self.workspace, "NHD", use_tensor_cores=True, backend="fa2")

    @torch.inference_mode(False)
    def _make_prefill(self) -> Any:
        return BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD", backend="fa2")
