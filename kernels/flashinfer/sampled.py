"""Decisions of every sort but the plain argmax: sampling, edits, cuts, confidences, rejection rules, log-probabilities.

Triton's kernels make them on the device; what they decided is read once, at the step's end.

Shapes: B sequences, of which b still draft; K draft tokens, R rows that decide, T packed tokens, V vocabulary,
H hidden.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.kernels.composed import compute_logits
from specdec.kernels.flashinfer import drafts
from specdec.kernels.flashinfer.transfer import upload
from specdec.kernels.interface import DraftChain, Verification, Verified

if TYPE_CHECKING:
    from specdec.kernels.flashinfer.backend import FlashInferKernels


class SampledDraws:
    """See `specdec.kernels.flashinfer.chain.Draws`; for chains with sampling."""

    def __init__(self, kernels: FlashInferKernels, head: Tensor, chain: DraftChain) -> None:
        assert chain.sampling is not None
        self._kernels, self._head, self._probs = kernels, head, chain.sampling.probs
        self._num, num_drafts, edits = len(chain.counts), max(chain.counts), chain.sampling.edits
        with kernels.drawers.packing(num_drafts, edits, head.shape[0]) as self._drawer:
            self._drawer.batch.pack_drafting(chain.sampling, chain.counts)
        self.ids = self._drawer.batch.drafts[: self._num]

    def draw(self, normed: Tensor, step: int, active: list[int]) -> None:
        logits = compute_logits(self._kernels, normed, self._head)  # [b, V]
        if len(active) < self._num:  # the drawer looks for sequence b in row b, and at no others
            places = {b: i for i, b in enumerate(active)}
            rows = [places.get(b, 0) for b in range(self._num)]
            logits = logits.index_select(0, upload(rows, self._kernels.device))
        self._drawer.draw(logits, step, self._probs)


def decide(kernels: FlashInferKernels, head: Tensor, hidden: Tensor, v: Verification) -> Verified:
    """What follows the target's hidden states [T, H]."""
    logits = compute_logits(kernels, drafts.deciding(hidden, v), head)  # [R, V]
    counts = [len(row) for row in v.drafts]
    first_rows = list(accumulate((count + 1 for count in counts[:-1]), initial=0))
    on_device = v.drafts_on_device
    num_drafts = max(counts) if on_device is None else on_device.shape[1]
    with kernels.deciders.packing(num_drafts, v.edits, logits.shape[1]) as decider:
        decider.batch.pack_verification(v, first_rows, None if on_device is None else counts)
    given = decider.batch.drafts if on_device is None else drafts.in_order(on_device, v.draft_rows, decider.batch.size)
    raw = logits.clone() if v.keep_logits else None
    decider.transform_(logits, given)
    processed = logits.clone() if v.keep_logits else None
    decided = decider.emit(logits, given, v.draft_probs)
    results = torch.cat([decided.num_accepted.unsqueeze(1), decided.token_ids, given], 1).tolist()  # the one wait
    token_ids = [row[1 : row[0] + 2] for row, _ in zip(results, counts)]
    known = [drafts.up_to_end(row[num_drafts + 2 :][:count]) for row, count in zip(results, counts)]
    return Verified(hidden, token_ids, raw, processed, known)
