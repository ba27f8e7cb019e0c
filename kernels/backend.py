"""What a new backend must offer: packed weights, whole decoders, drafts and verification.

A backend is a class with these attributes and methods and a branch in `specdec.kernels.select`. It may put them
together from single operations (`specdec.kernels.operations`), of which `specdec.kernels.reference` has plain ones, or
run each call as one kernel. `specdec.kernels.data` has what passes through it.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor

from specdec.kernels.data import (
    AttentionMetadata,
    DecoderOutput,
    DecoderWeights,
    DraftChain,
    Drafts,
    HiddenRows,
    Verified,
    VerifyBatch,
)
from specdec.kernels.fp8 import Fp8Kind, Fp8Matrix
from specdec.kernels.progress import Progress, silent

Packed = TypeVar("Packed")  # a matrix, or a stack of them, as the backend reads it
Prepared = TypeVar("Prepared")  # a decoder as the backend reads it


class Backend(Protocol[Packed, Prepared]):
    """Chosen once by `specdec.kernels.select`, then called without further questions."""

    name: str
    device: torch.device
    dtype: torch.dtype
    """Matrices, as they are loaded."""
    activation_dtype: torch.dtype
    """Everything else that flows through the model, biases and norm weights included."""
    cache_dtypes: tuple[torch.dtype, ...]
    """What a KV cache may be stored in."""
    fp8: frozenset[Fp8Kind]
    """The kinds of matrices of an FP8 checkpoint that stay in FP8; `pack` dequantises the others."""
    num_scratch_pages: int
    """So many pages at the end of an engine's KV cache are the backend's own."""

    def pack(self, weight: Tensor | Fp8Matrix, *, full_precision: bool = False) -> Packed:
        """A matrix [out, in], or a stack of experts [E, out, in], in the form that this backend reads.

        full_precision: never quantised (the router), and never an Fp8Matrix."""
        ...

    def pack_gate_up(self, weight: Tensor | Fp8Matrix) -> Packed:
        """The same for gate and up projections [2I, H], or [E, 2I, H], the gate rows first: for gated MLPs."""
        ...

    def num_bytes(self, packed: Packed) -> int:
        """Bytes of a packed weight."""
        ...

    def prepare(self, decoder: DecoderWeights) -> Prepared:
        """A decoder in the form that `decode` reads. It refers to the weights, so they must stay as they are."""
        ...

    def decode(
        self,
        decoder: Prepared,
        input_ids: list[int],
        previous: list[HiddenRows] | None,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        expert_ids: Tensor | None = None,
    ) -> DecoderOutput:
        """The whole of a prepared decoder: embed, fuse (MTP), layers, final norm.

        input_ids [T]; previous, T rows, if and only if the decoder has a fusion; kv_cache
        [layers, pages, 2, page_size, Hkv, D], appended to. expert_ids [layers, T, k] int64 is filled with every
        row's choices, where a layer has experts. Equals `specdec.kernels.decoder.run_decoder`, to the bit where the
        backend is row-invariant.
        """
        ...

    def draft_chain(
        self, decoder: Prepared, head: Packed, chain: DraftChain, expert_ids: Tensor | None = None
    ) -> Drafts:
        """Drafts of a prepared MTP layer: draft 1 comes from the last pair's row; each later one from one more row,
        which takes the draft before and the output before.

        expert_ids [1, T + (K-1) B, k] int64 is filled with the experts of the pairs, then at the beginning of every
        B rows with those of the sequences that still draft. Fewer than `chain.counts` drafts where
        its confidence ended a chain; where logits are not finite a sequence's last draft is NOT_FINITE, and other
        chains may end, too. Equals `specdec.kernels.speculation.draft_chain`.
        """
        ...

    def verify(
        self,
        decoder: Prepared,
        head: Packed,
        input_ids: list[int],
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        batch: VerifyBatch,
        expert_ids: Tensor | None = None,
    ) -> Verified:
        """`decode`, then for the rows that decide: logits -> edits -> truncation -> rules.

        input_ids [T]: any token stands in the places of drafts, which the backend fills. Equals
        `specdec.kernels.speculation.verify`.
        """
        ...

    def compute_logits(self, hidden: Tensor, head: Packed) -> Tensor:
        """hidden [R, H], packed head [V, H] -> logits [R, V] in at least fp32."""
        ...


AnyBackend: TypeAlias = Backend[Any, Any]


@runtime_checkable
class CapturesGraphs(Protocol):
    """A backend that can record forwards of fixed shapes beforehand and replay them in decode steps."""

    def capture(
        self,
        target: Any,
        mtp: Any | None,
        kv_cache: Tensor,
        *,
        max_num_seqs: int,
        draft_lengths: list[int],
        max_model_len: int,
        progress: Progress = silent,
    ) -> None:
        """Prepared decoders; kv_cache with the backend's scratch pages, its last layer the MTP layer's if there is
        one. What decodes up to max_num_seqs sequences with no drafts, or up to one of draft_lengths each, is replayed
        from then on, everything else runs as before. `progress` hears of each graph."""
        ...
