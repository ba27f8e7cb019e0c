"""The scheduler against its promises, over random arrivals and lengths."""

from __future__ import annotations

import random

import pytest
import torch

from specdec import CacheFullError, SamplingParams, SpeculationParams
from specdec.kernels.interface import HiddenRows
from specdec.kv_cache import PagePool
from specdec.scheduler import Scheduler
from specdec.sequence import Sequence
from specdec.text import OutputText


def make_sequence(name: str, num_prompt: int, max_tokens: int, k: int) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    output = OutputText(None, params)
    return Sequence(
        name, [1] * num_prompt, params, SpeculationParams(k), 0, num_prompt + max_tokens, frozenset(), output
    )


def advance(sequence: Sequence, num_new: int, num_draft: int, rng: random.Random) -> None:
    """What commit does to the counters: a random number of drafts is accepted."""
    samples = num_new == sequence.num_uncomputed_tokens
    accepted = rng.randint(0, num_draft)
    sequence.num_computed_tokens += num_new + accepted
    if sequence.speculates:
        sequence.pending_hidden = HiddenRows(torch.zeros(1, 1), 0, 1)
    if samples:
        sequence.token_ids += [1] * (accepted + 1)
        if len(sequence.token_ids) >= sequence.max_total_tokens or rng.random() < 0.05:
            sequence.finish_reason = "length"


@pytest.mark.parametrize("seed", range(200))
def test_random_schedules_keep_every_promise(seed: int) -> None:
    rng = random.Random(seed)
    pool = PagePool(rng.randint(10, 40), rng.choice([1, 4, 16]))
    max_num_seqs = rng.randint(1, 6)
    budget = max_num_seqs * 9 + rng.choice([0, 1, 30])
    scheduler = Scheduler(pool, max_num_seqs, budget)
    arrivals = [
        make_sequence(f"r{i}", rng.randint(1, 60), rng.randint(1, 12), rng.choice([0, 1, 3, 8])) for i in range(12)
    ]
    expected, admitted = [], []
    for sequence in arrivals:
        if pool.pages_for(sequence.max_total_tokens) > pool.num_pages:
            with pytest.raises(CacheFullError):
                scheduler.add(sequence)
            continue
        scheduler.add(sequence)
        expected.append(sequence)
    for _ in range(2000):
        if scheduler.idle:
            break
        scheduled = scheduler.schedule()
        assert scheduled, "something runs, yet nothing is scheduled"
        assert len(scheduler.running) <= max_num_seqs
        assert sum(s.num_new_tokens + s.num_draft_tokens for s in scheduled) <= budget
        pool.check_integrity([s.page_table for s in scheduler.running])
        decoding = [s for s in scheduler.running if s.num_uncomputed_tokens == 1]
        assert all(any(x.sequence is s for x in scheduled) for s in decoding), "a decoding request was stalled"
        for s in scheduled:
            end = s.sequence.num_computed_tokens + s.num_new_tokens + s.num_draft_tokens
            assert s.num_new_tokens >= 1
            assert end <= len(s.sequence.page_table) * pool.page_size
            assert s.num_draft_tokens == 0 or s.samples
            assert s.num_draft_tokens <= s.sequence.speculation.num_speculative_tokens
            if s.samples:
                assert len(s.sequence.token_ids) + s.num_draft_tokens + 1 <= s.sequence.max_total_tokens
        admitted += [s for s in scheduler.running if s not in admitted]
        for s in scheduled:
            advance(s.sequence, s.num_new_tokens, s.num_draft_tokens, rng)
        scheduler.remove_finished()
        if rng.random() < 0.05 and not scheduler.idle:
            aborted = rng.choice([*scheduler.waiting, *scheduler.running])
            aborted.finish_reason = "abort"
            scheduler.remove_finished()
    assert scheduler.idle
    assert all(s.finished for s in expected)
    order = [s for s in expected if s in admitted]
    assert admitted == order, "admission is first come, first served"
    pool.check_integrity([])


def test_integrity_check_sees_lost_shared_and_double_pages() -> None:
    pool = PagePool(4, 16)
    pages = pool.allocate(2)
    pool.check_integrity([pages])
    for tables in ([], [pages, pages], [[pages[0]]]):
        with pytest.raises(AssertionError):
            pool.check_integrity(tables)
    pool.release(pages)
    pool.release(pages[:1])
    with pytest.raises(AssertionError):
        pool.check_integrity([])
