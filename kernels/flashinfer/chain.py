"""Draft chains whose tokens stay on the device.

Shapes: B sequences, of which b still draft; K draft tokens, Q kept distributions, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from specdec.kernels.data import AttentionMetadata, DecoderOutput
from specdec.kernels.decisions import DraftChain, Drafts
from specdec.kernels.flashinfer.transfer import upload
from specdec.kernels.speculation import one_more_row

Prepared = TypeVar("Prepared", contravariant=True)


class RunsDecoders(Protocol[Prepared]):
    """A backend that runs forwards from tokens and states on the device."""

    device: torch.device
    """Where tensors are."""

    def run(
        self,
        decoder: Prepared,
        tokens: Tensor,
        previous: Tensor | None,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        expert_ids: Tensor | None = None,
    ) -> DecoderOutput:
        """Runs `Backend.decode` from tokens [T] int32 and previous states [T, H] on the device."""
        ...


class Draws(Protocol):
    """How one chain's drafts are drawn, on the device."""

    ids: Tensor
    """[B, K] int64: drafts so far, padded with NOT_DRAFTED, perhaps in memory that the next chain takes."""
    prob_rows: list[int]
    """[B]: see `Drafts.prob_rows`."""
    probs: Tensor | None
    """[Q, K, V]: see `Drafts.probs`."""

    def draw(self, normed: Tensor, step: int, active: list[int]) -> None:
        """Draws the next drafts into ids[active, step]; NOT_DRAFTED where a chain ends, or has ended.

        normed: [b, H], hidden states after the final norm.
        step: number of the draft, from 0.
        active: [b], the sequences that still draft.
        """
        ...


def device_chain(
    kernels: RunsDecoders[Prepared], decoder: Prepared, chain: DraftChain, make_draws: Callable[[], Draws]
) -> Drafts:
    """Runs `Backend.draft_chain` without a look at the drafts: every chain runs for as many steps as it may have
    drafts.

    make_draws: called once the pairs are queued, if there are drafts to draw.
    """
    device, metadata, counts = kernels.device, chain.metadata, chain.counts
    pairs = torch.cat([rows.tensor() for rows in chain.previous])
    output = kernels.run(decoder, upload(chain.input_ids, device), pairs, metadata, chain.kv_cache)
    active = [b for b, count in enumerate(counts) if count > 0]
    if not active:
        return Drafts.of([[] for _ in counts])
    draws = make_draws()
    ends = metadata.query_starts[1:]
    last = upload([ends[b] - 1 for b in active], device)
    output = DecoderOutput(*(x.index_select(0, last) for x in output))
    draws.draw(output.normed, 0, active)
    for step in range(1, max(counts)):
        kept = [i for i, b in enumerate(active) if counts[b] > step]
        active = [active[i] for i in kept]
        rows, sequences = upload(kept + active, device).chunk(2)
        recycled = (output.unnormed if chain.recycle_unnormed else output.normed).index_select(0, rows)
        drafted = draws.ids[:, step - 1].index_select(0, sequences).clamp(min=0).int()
        output = kernels.run(decoder, drafted, recycled, one_more_row(metadata, active, step), chain.kv_cache)
        draws.draw(output.normed, step, active)
    zeros = [[0] * count for count in counts]
    return Drafts(zeros, draws.prob_rows, draws.probs, draws.ids.clone(), list(range(len(counts))))
