"""A chain's draws on the device: those of the composed path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.kernels import speculation
from specdec.kernels.data import AttentionMetadata, DecoderOutput, HiddenRows
from specdec.kernels.decisions import NOT_DRAFTED, NOT_FINITE, ChainSampling, DraftChain, Drafts, room_for_probs
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


def composed_chain(logits: Tensor, sampling: ChainSampling) -> Drafts:
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
    return speculation.draft_chain(GivenChain(logits), None, None, chain)


def drawn(drawer: Drawer, logits: Tensor, sampling: ChainSampling) -> Drafts:
    batch = drawer.batch
    probs, prob_rows = room_for_probs(sampling.keep_probs, STEPS, logits.shape[-1], torch.float32, batch.device)
    batch.pack_drafting(sampling, COUNTS, prob_rows)
    for step, rows in enumerate(logits):
        padding = torch.full((batch.size - NUM, rows.shape[1]), float("nan"))
        drawer.draw(torch.cat([rows, padding]).to(batch.device), step, probs)
    drafts = batch.drafts.tolist()
    assert drafts[NUM:] == [[NOT_DRAFTED] * STEPS] * (batch.size - NUM)
    for row in drafts:
        ended = next((i for i, token in enumerate(row) if token < 0), STEPS)
        assert row[ended + 1 :] == [NOT_DRAFTED] * (STEPS - ended - 1), "a chain that has ended goes on"
    token_ids = [[token for token in row if token != NOT_DRAFTED] for row in drafts[:NUM]]
    return Drafts(token_ids, prob_rows, None if probs is None else probs.cpu())


def draft_sampling(vocab_size: int, seed: int) -> ChainSampling:
    return ChainSampling(
        rows=mixed_rows(NUM, [1, -1, 0]),
        edits=[random_edits(vocab_size, seed + b) if b % 2 else None for b in range(NUM)],
        min_confidence=[0.0, 0.0, 0.6, 0.5, 0.0, 0.4, 0.0],
        keep_probs=[True, False, False, True, False, True, False],
    )


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [40, 1100])
def test_drafts_and_laws_are_the_composed_ones(device: torch.device, vocab_size: int) -> None:
    """Laws to the rounding of scale * logit in fp32, which the reference has in its exponent: 2^-24 of up to 40."""
    drawer = Drawer(Batch(NUM + 2, STEPS, device, edit_words=2000), vocab_size)
    ended = 0
    for seed in range(2 if vocab_size == 40 else 1):
        logits = 3 * randn(STEPS, NUM, vocab_size, seed=seed)
        sampling = draft_sampling(vocab_size, seed)
        ours, expected = drawn(drawer, logits, sampling), composed_chain(logits, sampling)
        assert ours.token_ids == expected.token_ids
        assert ours.prob_rows == expected.prob_rows
        assert ours.probs is not None
        assert expected.probs is not None
        torch.testing.assert_close(ours.probs, expected.probs, rtol=1e-5, atol=0, equal_nan=True)  # fresh memory is NaN
        ended += sum(number < count for number, count in zip(expected.counts, COUNTS))
    assert ended > 0, "no chain was ended by its confidence"


@pytest.mark.slow
def test_logits_that_are_not_finite_end_their_own_chain(device: torch.device) -> None:
    logits = 3 * randn(STEPS, NUM, 40)
    sampling = draft_sampling(40, 0)
    sampling.min_confidence = [0.0] * NUM
    sampling.edits = [None] * NUM
    sound = composed_chain(logits, sampling).token_ids
    logits[1, 5] = float("nan")
    drafts = drawn(Drawer(Batch(NUM, STEPS, device), 40), logits, sampling).token_ids
    assert drafts[5] == [sound[5][0], NOT_FINITE]
    assert drafts[:5] + drafts[6:] == sound[:5] + sound[6:]
