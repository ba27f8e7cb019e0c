"""Draft chains whose tokens stay on the device.

Shapes: B sequences, K draft tokens, T pairs, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.kernels.flashinfer.transfer import upload
from specdec.kernels.interface import NOT_DRAFTED, NOT_FINITE, AttentionMetadata, DecoderOutput, DraftChain, Drafts

if TYPE_CHECKING:
    from specdec.kernels.flashinfer.backend import FlashInferKernels, PreparedDecoder


def greedy_chain(kernels: FlashInferKernels, decoder: PreparedDecoder, head: Any, chain: DraftChain) -> Drafts:
    """`Kernels.draft_chain` where every draft is an argmax: who drafts at which step is known before any is."""
    device, metadata, counts = kernels.device, chain.metadata, chain.counts
    pairs = torch.cat([rows.tensor() for rows in chain.previous])
    output = kernels.run(decoder, upload(chain.input_ids, device), pairs, metadata, chain.kv_cache)
    active = [b for b, count in enumerate(counts) if count > 0]
    if not active:
        return Drafts([[] for _ in counts])
    ids = torch.full((len(counts), max(counts)), NOT_DRAFTED, device=device)  # [B, K]
    ends = metadata.query_starts[1:]
    last = upload([ends[b] - 1 for b in active], device)
    output = DecoderOutput(*(x.index_select(0, last) for x in output))
    tokens = _draw(kernels, head, output, ids[:, 0], active)
    for step in range(1, max(counts)):
        kept = [i for i, b in enumerate(active) if counts[b] > step]
        active = [active[i] for i in kept]
        rows = upload(kept, device)
        recycled = (output.unnormed if chain.recycle_unnormed else output.normed).index_select(0, rows)
        one_more = AttentionMetadata(
            [1] * len(active),
            [metadata.kv_lens[b] + step for b in active],
            [metadata.page_tables[b] for b in active],
            metadata.page_size,
        )
        drafted = tokens.index_select(0, rows).clamp(min=0).int()
        output = kernels.run(decoder, drafted, recycled, one_more, chain.kv_cache)
        tokens = _draw(kernels, head, output, ids[:, step], active)
    return Drafts([[0] * count for count in counts], ids)


def _draw(kernels: FlashInferKernels, head: Any, output: DecoderOutput, ids: Tensor, active: list[int]) -> Tensor:
    """The next drafts of some of the sequences, also into ids [B]."""
    best = kernels.head_argmax(output.normed, head)
    tokens = torch.where(best < 0, NOT_FINITE, best)
    ids.index_copy_(0, upload(active, kernels.device, torch.int64), tokens)
    return tokens
