"""The incremental MTP cache against a full recomputation, over random histories of accepts and rejects."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdec.cache.pages import PagePool, allocate_kv_cache
from specdec.config import SamplingParams, SpeculationParams
from specdec.kernels import select
from specdec.kernels.data import HiddenRows
from specdec.model.weights import CheckpointIndex, LoadedModel, load_model
from specdec.request.sequence import Sequence
from specdec.request.text import OutputText
from specdec.step.batch import Extend, build_batch
from specdec.step.commit import commit
from specdec.step.draft import MTPDrafts
from specdec.step.scheduler import ScheduledSequence
from specdec.step.verify import TargetResult

CPU = torch.device("cpu")
NUM_HISTORIES, BATCH_SIZE, NUM_ITERATIONS, MAX_TOKENS = 2000, 4, 6, 80


@pytest.fixture
def recorded(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits of every head evaluation."""
    kernels, logits = model.target.kernels, []

    def head_argmax(x: Tensor, head: Tensor) -> Tensor:
        logits.append(kernels.linear(x, head))
        return type(kernels).head_argmax(kernels, x, head)

    monkeypatch.setattr(kernels, "head_argmax", head_argmax)
    return logits


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(CheckpointIndex.open(tiny_checkpoint), select(CPU, torch.float64, "reference"))


def make_sequence(rng: random.Random, num_prompt: int, num_draft: int, pages: list[int]) -> Sequence:
    token_ids = [rng.randrange(259) for _ in range(num_prompt)]
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    speculation = SpeculationParams(num_speculative_tokens=num_draft)
    output = OutputText(None, params)
    output.push = lambda token_id: False
    sequence = Sequence("r", token_ids, params, speculation, 0, 10**6, frozenset(), output)
    sequence.page_table = pages
    return sequence


def commit_random(
    scheduled: Seq[ScheduledSequence],
    draft_ids: list[list[int]],
    accepted: list[int],
    hidden: dict[int, list[Tensor]],
    rng: random.Random,
) -> None:
    """Commits `accepted` drafts and a random token, with random target hidden states for all rows."""
    output, rows = [], []
    for b, s in enumerate(scheduled):
        rows.append(torch.randn(s.num_new_tokens + s.num_draft_tokens, 32, dtype=torch.float64))
        hidden[b] += rows[b][: s.num_new_tokens + accepted[b]]
        output.append([*draft_ids[b][: accepted[b]], rng.randrange(259)])
    states = [HiddenRows(h, 0, len(h)) for h in rows]
    commit(scheduled, TargetResult(output, draft_ids, states, [[] for _ in scheduled]))


def recompute(model: LoadedModel, token_ids: list[int], hidden: Tensor, drafts: list[int]) -> list[Tensor]:
    """Logits of every draft step from scratch: all pairs anew for each step, in one page."""
    assert model.mtp is not None
    length = len(token_ids) - 1 + len(drafts)
    cache = allocate_kv_cache(model.config, 1, 1, length, torch.float64, CPU)[0].fill_(float("nan"))
    tokens, inputs, logits = token_ids[1:], hidden, []
    for draft in [*drafts, None]:
        batch = build_batch([Extend(tokens, 0, [0])], length)
        output = model.mtp.draft(inputs, batch.input_ids, batch.metadata, cache)
        logits.append(model.target.compute_logits(output.normed[-1:])[0])
        if draft is not None:
            tokens, inputs = [*tokens, draft], torch.cat([inputs, output.normed[-1:]])
    return logits


@pytest.mark.slow
@torch.inference_mode()
def test_incremental_logits_equal_full_recomputation(model: LoadedModel, recorded: list[Tensor]) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    assert model.mtp is not None
    for history in range(NUM_HISTORIES // BATCH_SIZE):
        page_size = rng.choice([1, 2, 3, 5, 16])
        pool = PagePool(BATCH_SIZE * -(-(MAX_TOKENS + 20) // page_size), page_size)
        cache = allocate_kv_cache(model.config, 1, pool.num_pages, page_size, torch.float64, CPU)[0].fill_(float("nan"))
        drafter = MTPDrafts(model.target, model.mtp, cache, page_size, "post_norm")
        sequences = [
            make_sequence(rng, rng.randint(2, 20), rng.randint(1, 5), pool.allocate(pool.num_pages // BATCH_SIZE))
            for _ in range(BATCH_SIZE)
        ]
        hidden: dict[int, list[Tensor]] = {b: [] for b in range(BATCH_SIZE)}
        prefill = [ScheduledSequence(s, s.num_uncomputed_tokens, 0) for s in sequences]
        commit_random(prefill, drafter.draft(prefill).token_ids, [0] * BATCH_SIZE, hidden, rng)
        for iteration in range(NUM_ITERATIONS):
            # some steps draft fewer tokens than asked for, or none
            counts = [rng.choice([0, s.speculation.num_speculative_tokens, rng.randint(1, 5)]) for s in sequences]
            scheduled = [ScheduledSequence(s, 1, k) for s, k in zip(sequences, counts)]
            recorded.clear()
            drafts = drafter.draft(scheduled)
            if iteration == NUM_ITERATIONS - 1:
                for b, k in enumerate(counts):
                    chain = drafts.token_ids[b][: max(0, k - 1)]
                    expected = recompute(model, sequences[b].token_ids, torch.stack(hidden[b]), chain)
                    for step in range(k):
                        row = sum(count > step for count in counts[:b])
                        difference = (recorded[step][row] - expected[step]).abs().max()
                        assert difference <= 1e-12, f"history {history}, sequence {b}, draft {step + 1}"
            accepted = [rng.randint(0, k) for k in counts]
            commit_random(scheduled, drafts.token_ids, accepted, hidden, rng)
