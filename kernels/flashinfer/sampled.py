"""Decisions of every sort but the plain argmax: sampling, edits, cuts, confidences, rejection rules, log-probabilities.

Triton's kernels make them on the device; what they decided is read once, at the step's end.

Shapes: B sequences, of which b still draft; K draft tokens, R rows that decide, T packed tokens, V vocabulary,
H hidden.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.kernels.decisions import DraftChain, Verified, VerifyBatch, room_for_probs
from specdec.kernels.flashinfer import drafts
from specdec.kernels.flashinfer.kept import Kept
from specdec.kernels.flashinfer.transfer import upload
from specdec.kernels.operations import Operations
from specdec.kernels.speculation import compute_logits
from specdec.kernels.triton import Decider, Drawer


class DecidesOnDevice(Operations, Protocol):
    """A backend that keeps what decides on the device from step to step."""

    deciders: Kept[Decider]
    """Verify drafts."""
    drawers: Kept[Drawer]
    """Draw drafts."""


class SampledDraws:
    """The `specdec.kernels.flashinfer.chain.Draws` of chains with sampling."""

    def __init__(self, kernels: DecidesOnDevice, head: Any, chain: DraftChain) -> None:
        assert chain.sampling is not None
        self._kernels, self._head, self._num = kernels, head, len(chain.counts)
        num_drafts, vocab_size, sampling = max(chain.counts), head.shape[0], chain.sampling
        self.probs, self.prob_rows = room_for_probs(
            sampling.keep_probs, num_drafts, vocab_size, torch.float32, kernels.device
        )
        with kernels.drawers.packing(num_drafts, sampling.edits, vocab_size) as self._drawer:
            self._drawer.batch.pack_drafting(sampling, chain.counts, self.prob_rows)
        self.ids = self._drawer.batch.drafts[: self._num]

    def draw(self, normed: Tensor, step: int, active: list[int]) -> None:
        logits = compute_logits(self._kernels, normed, self._head)  # [b, V]
        if len(active) < self._num:  # the drawer looks for sequence b in row b, and at no others
            places = {b: i for i, b in enumerate(active)}
            rows = [places.get(b, 0) for b in range(self._num)]
            logits = logits.index_select(0, upload(rows, self._kernels.device))
        self._drawer.draw(logits, step, self.probs)


def decide(kernels: DecidesOnDevice, head: Any, hidden: Tensor, batch: VerifyBatch) -> Verified:
    """Decides a batch from the target's hidden states [T, H], with one wait for the device, at the end."""
    logits = compute_logits(kernels, drafts.deciding(hidden, batch), head)  # [R, V]
    on_device, counts = batch.drafts.on_device, batch.drafts.counts
    num_drafts = max(counts) if on_device is None else on_device.shape[1]
    # 1) The host's half: what the sequences ask for, packed into one copy.
    first_rows = list(accumulate((count + 1 for count in counts[:-1]), initial=0))
    with kernels.deciders.packing(num_drafts, batch.edits, logits.shape[1]) as decider:
        decider.batch.pack_verification(batch, first_rows)
    given = decider.batch.drafts
    if on_device is not None:
        given = drafts.in_order(on_device, batch.drafts.device_rows, decider.batch.size)
    # 2) The device's half: the transform, then the rules.
    raw = logits.clone() if batch.keep_logits else None
    decider.transform_(logits, given)
    processed = logits.clone() if batch.keep_logits else None
    decided = decider.emit(logits, given, batch.drafts.probs)
    # 3) The one wait: accepted tokens, and the drafts, which the host learns only now.
    results = torch.cat([decided.num_accepted.unsqueeze(1), decided.token_ids, given], 1).tolist()
    token_ids = [row[1 : row[0] + 2] for row, _ in zip(results, counts)]
    known = [drafts.up_to_end(row[num_drafts + 2 :][:count]) for row, count in zip(results, counts)]
    return Verified(hidden, token_ids, known, raw, processed)
