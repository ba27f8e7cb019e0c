"""What a new backend must offer: packed weights, whole decoders, drafts and verification.

A backend is a class with these attributes and methods and a branch in `specdec.kernels.select`. It may put them
together from single operations (`specdec.kernels.operations`), of which `specdec.kernels.reference` has plain ones, or
run each call as one kernel. `specdec.kernels.data` and `specdec.kernels.decisions` have what passes through it.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor

from specdec.kernels.data import AttentionMetadata, DecoderOutput, DecoderWeights, HiddenRows
from specdec.kernels.decisions import DraftChain, Drafts, Verified, VerifyBatch
from specdec.kernels.fp8 import Fp8Kind, Fp8Matrix
from specdec.kernels.progress import Progress, silent

Packed = TypeVar("Packed")  # a matrix, or a stack of them, as the backend reads it
Prepared = TypeVar("Prepared")  # a decoder as the backend reads it


class Backend(Protocol[Packed, Prepared]):
    """What computes a model's forwards: chosen once by `specdec.kernels.select`, then called without further
    questions."""

    name: str
    """One of `specdec.kernels.BACKENDS`."""
    device: torch.device
    """Where all tensors are."""
    dtype: torch.dtype
    """Dtype of matrices as they are loaded."""
    activation_dtype: torch.dtype
    """Dtype of everything else that flows through the model, biases and norm weights included."""
    cache_dtypes: tuple[torch.dtype, ...]
    """Dtypes that a KV cache may be stored in."""
    fp8: frozenset[Fp8Kind]
    """The kinds of matrices of an FP8 checkpoint that stay in FP8; `pack` dequantises the others."""
    num_scratch_pages: int
    """Number of pages at the end of an engine's KV cache that are the backend's own."""

    def pack(self, weight: Tensor | Fp8Matrix, *, full_precision: bool = False) -> Packed:
        """Returns a matrix in the form that this backend reads.

        weight: [out, in], or a stack of experts [E, out, in].
        full_precision: it is never quantised (the router), and never an Fp8Matrix.
        """
        ...

    def pack_gate_up(self, weight: Tensor | Fp8Matrix) -> Packed:
        """Returns the gate and up projections of gated MLPs in the form that this backend reads.

        weight: [2I, H], or [E, 2I, H] for a stack of experts; the gate rows come first.
        """
        ...

    def num_bytes(self, packed: Packed) -> int:
        """Returns the bytes of a packed weight."""
        ...

    def prepare(self, decoder: DecoderWeights) -> Prepared:
        """Returns a decoder in the form that `decode` reads. It refers to the weights, which must stay as they are."""
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
        """Runs the whole of a prepared decoder: embedding, fusion (MTP layer), layers, final norm.

        Equals `specdec.kernels.decoder.run_decoder`, to the bit where the backend is row-invariant.

        decoder: what `prepare` returned.
        input_ids: [T], the packed tokens.
        previous: T rows of hidden states, given if and only if the decoder has a fusion.
        metadata: where the tokens live in the cache.
        kv_cache: [layers, pages, 2, page_size, Hkv, D], which is appended to.
        expert_ids: [layers, T, k] int64, filled with every row's choices where a layer has experts; None for none.
        """
        ...

    def draft_chain(
        self, decoder: Prepared, head: Packed, chain: DraftChain, expert_ids: Tensor | None = None
    ) -> Drafts:
        """Drafts with a prepared MTP layer.

        Draft 1 comes from the row of a sequence's last pair; each later one from one more row, which takes the draft
        before and the output before. There are fewer than `chain.counts` drafts where the confidence ended a chain.
        Where logits are not finite a sequence's last draft is NOT_FINITE, and other chains may end, too. Equals
        `specdec.kernels.speculation.draft_chain`.

        decoder: what `prepare` returned.
        head: the packed head [V, H].
        chain: the pairs to run over, and how many drafts follow.
        expert_ids: [1, T + (K - 1) B, k] int64, filled with the experts of the pairs, then at the beginning of every
            B rows with those of the sequences that still draft; None for none.
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
        """Runs `decode`, then for the rows that decide: logits -> edits -> truncation -> rules.

        Equals `specdec.kernels.speculation.verify`.

        decoder, metadata, kv_cache, expert_ids: see `decode`.
        head: the packed head [V, H].
        input_ids: [T], with any token in the places of drafts, which the backend fills.
        batch: which rows decide, after which drafts and by which rules.
        """
        ...

    def compute_logits(self, hidden: Tensor, head: Packed) -> Tensor:
        """Returns logits [R, V], in at least fp32, of hidden states [R, H] and a packed head [V, H]."""
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
        """Records the forwards of decode steps, which are replayed from then on; everything else runs as before.

        target, mtp: prepared decoders; mtp None without an MTP layer.
        kv_cache: the engine's, scratch pages included; its last layer is the MTP layer's if there is one.
        max_num_seqs: the most sequences of a recorded step.
        draft_lengths: a recorded step has no drafts, or up to one of these lengths in each sequence.
        max_model_len: the most tokens of a sequence.
        progress: hears of each graph.
        """
        ...
