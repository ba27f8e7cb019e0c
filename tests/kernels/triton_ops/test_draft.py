"""A chain's draws on the device: those of the composed path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.kernels import composed
from specdec.kernels.interface import (
    NOT_DRAFTED,
    NOT_FINITE,
    AttentionMetadata,
    DecoderOutput,
    DraftChain,
    DraftSampling,
    HiddenRows,
)
from specdec.kernels.reference import ReferenceKernels
from specdec.kernels.triton import Batch, Drawer
from support.fakes import randn
from support.sampled_rows import mixed_rows, random_edits

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, for what no lane goes on to use
]

COUNTS = [3, 0, 3, 2, 1, 3, 3]
NUM, STEPS = len(COUNTS), max(COUNTS)


class GivenChain(ReferenceKernels):
    """Hidden states are numbers of sequences, whose logits are given for every step."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(torch.device("cpu"), torch.float32)
        self.logits, self.step = logits, -1  # [K, B, V]

    def decode(self, decoder: Any, input_ids: Any, previous: Any, *args: Any, **kwargs: Any) -> DecoderOutput:
        self.step += 1
        hidden = torch.cat([rows.tensor() for rows in previous])
        return DecoderOutput(hidden, hidden)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.logits[self.step, x[:, 0].long()]


def composed_chain(logits: Tensor, sampling: DraftSampling) -> list[list[int]]:
    hidden = torch.arange(NUM, dtype=torch.float32)[:, None]
    chain = DraftChain(
        input_ids=[0] * NUM,
        previous=[HiddenRows(hidden, b, 1) for b in range(NUM)],
        metadata=AttentionMetadata([1] * NUM, [5] * NUM, [[0]] * NUM, 16),
        kv_cache=torch.empty(1, 1, 2, 16, 1, 2),
        counts=COUNTS,
        recycle_unnormed=False,
        sampling=sampling,
    )
    return composed.draft_chain(GivenChain(logits), None, None, chain).token_ids


def drawn(drawer: Drawer, logits: Tensor, sampling: DraftSampling) -> list[list[int]]:
    batch, probs = drawer.batch, sampling.probs
    on_device = None if probs is None else probs.to(batch.device)
    batch.pack_drafting(sampling, COUNTS)
    for step, rows in enumerate(logits):
        padding = torch.full((batch.size - NUM, rows.shape[1]), float("nan"))
        drawer.draw(torch.cat([rows, padding]).to(batch.device), step, on_device)
    if probs is not None and on_device is not None:
        probs.copy_(on_device)
    drafts = batch.drafts.tolist()
    assert drafts[NUM:] == [[NOT_DRAFTED] * STEPS] * (batch.size - NUM)
    for row in drafts:
        ended = next((i for i, token in enumerate(row) if token < 0), STEPS)
        assert row[ended + 1 :] == [NOT_DRAFTED] * (STEPS - ended - 1), "a chain that has ended goes on"
    return [[token for token in row if token != NOT_DRAFTED] for row in drafts[:NUM]]


def draft_sampling(vocab_size: int, seed: int) -> DraftSampling:
    return DraftSampling(
        rows=mixed_rows(NUM, [1, -1, 0]),
        edits=[random_edits(vocab_size, seed + b) if b % 2 else None for b in range(NUM)],
        min_confidence=[0.0, 0.0, 0.6, 0.5, 0.0, 0.4, 0.0],
        probs=torch.full((3, STEPS, vocab_size), 7.0),
        prob_rows=[1, -1, -1, 0, -1, 2, -1],
    )


@pytest.mark.parametrize("vocab_size", [40, 1100])
def test_drafts_and_laws_are_the_composed_ones(device: torch.device, vocab_size: int) -> None:
    """Laws to the rounding of scale * logit in fp32, which the reference has in its exponent: 2^-24 of up to 40."""
    drawer = Drawer(Batch(NUM + 2, STEPS, device, edit_words=2000), vocab_size)
    ended = 0
    for seed in range(2 if vocab_size == 40 else 1):
        logits = 3 * randn(STEPS, NUM, vocab_size, seed=seed)
        ours, expected = draft_sampling(vocab_size, seed), draft_sampling(vocab_size, seed)
        drafts = composed_chain(logits, expected)
        assert drawn(drawer, logits, ours) == drafts
        assert ours.probs is not None
        assert expected.probs is not None
        assert torch.equal(ours.probs == 7.0, expected.probs == 7.0)
        torch.testing.assert_close(ours.probs, expected.probs, rtol=1e-5, atol=0)
        ended += sum(len(row) < count for row, count in zip(drafts, COUNTS))
    assert ended > 0, "no chain was ended by its confidence"


def test_logits_that_are_not_finite_end_their_own_chain(device: torch.device) -> None:
    logits = 3 * randn(STEPS, NUM, 40)
    sampling = draft_sampling(40, 0)
    sampling.min_confidence = [0.0] * NUM
    sampling.edits = [None] * NUM
    sound = composed_chain(logits, sampling)
    logits[1, 5] = float("nan")
    drafts = drawn(Drawer(Batch(NUM, STEPS, device), 40), logits, sampling)
    assert drafts[5] == [sound[5][0], NOT_FINITE]
    assert drafts[:5] + drafts[6:] == sound[:5] + sound[6:]
