"""Draft chains whose tokens stay on the device.

Shapes: B sequences, of which b still draft; K draft tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from specdec.kernels.flashinfer.transfer import upload
from specdec.kernels.interface import AttentionMetadata, DecoderOutput, DraftChain, Drafts

if TYPE_CHECKING:
    from specdec.kernels.flashinfer.backend import FlashInferKernels, PreparedDecoder


class Draws(Protocol):
    """How one chain's drafts are drawn, on the device. ids [B, K]: padded with NOT_DRAFTED, perhaps in memory that the
    next chain takes."""

    ids: Tensor

    def draw(self, normed: Tensor, step: int, active: list[int]) -> None:
        """Hidden states [b, H] of the sequences `active` [b] -> ids[active, step]; NOT_DRAFTED where the chain ends, or
        has ended."""
        ...


MakeDraws = Callable[["FlashInferKernels", Tensor, DraftChain], Draws]


def device_chain(
    kernels: FlashInferKernels, decoder: PreparedDecoder, head: Tensor, chain: DraftChain, make_draws: MakeDraws
) -> Drafts:
    """`Kernels.draft_chain` where the host does not look: it runs every chain for as many steps as it may have drafts.
    make_draws: called if there are any."""
    device, metadata, counts = kernels.device, chain.metadata, chain.counts
    pairs = torch.cat([rows.tensor() for rows in chain.previous])
    output = kernels.run(decoder, upload(chain.input_ids, device), pairs, metadata, chain.kv_cache)
    active = [b for b, count in enumerate(counts) if count > 0]
    if not active:
        return Drafts([[] for _ in counts])
    draws = make_draws(kernels, head, chain)
    ends = metadata.query_starts[1:]
    last = upload([ends[b] - 1 for b in active], device)
    output = DecoderOutput(*(x.index_select(0, last) for x in output))
    draws.draw(output.normed, 0, active)
    for step in range(1, max(counts)):
        kept = [i for i, b in enumerate(active) if counts[b] > step]
        active = [active[i] for i in kept]
        rows, sequences = upload(kept + active, device).chunk(2)
        recycled = (output.unnormed if chain.recycle_unnormed else output.normed).index_select(0, rows)
        one_more = AttentionMetadata(
            [1] * len(active),
            [metadata.kv_lens[b] + step for b in active],
            [metadata.page_tables[b] for b in active],
            metadata.page_size,
        )
        drafted = draws.ids[:, step - 1].index_select(0, sequences).clamp(min=0).int()
        output = kernels.run(decoder, drafted, recycled, one_more, chain.kv_cache)
        draws.draw(output.normed, step, active)
    return Drafts([[0] * count for count in counts], draws.ids.clone())
