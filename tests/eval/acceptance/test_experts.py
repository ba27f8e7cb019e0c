"""Distinct experts against a count by hand."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from specdec import Engine
from specdec.eval.acceptance.analyse import Completion
from specdec.eval.acceptance.experts import _grouped, _membership, measure_experts
from specdec.eval.acceptance.generate import Request, Round, run_turn
from specdec.eval.acceptance.plan import AcceptanceOptions, Cell
from specdec.eval.acceptance.replay import Reader
from support.fakes import write_planted_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
K = 3


@pytest.mark.slow
def test_counts_are_those_of_the_engines_own_verifications(tmp_path: Path) -> None:
    """The engine's forwards, traced one request at a time, are the same tokens at the same places."""
    engine = Engine.from_pretrained(
        write_planted_checkpoint(tmp_path), kernels="reference", dtype="float64", max_num_seqs=1
    )
    cell, done = Cell(0.0, 1, "greedy", "greedy", K), Round([], [])
    requests = [Request(i, "x", 0, [10 + 7 * i, 3]) for i in range(17)]
    with engine.runtime.model.target.decoder.traced() as runs:
        run_turn(engine, AcceptanceOptions(max_tokens=16), cell, requests, 0, done)
    full = [run.expert_ids[1].tolist() for run in runs if run.expert_ids.shape[1] == K + 1 and run.kv_lens[0] > K + 1]
    sizes = [sum(len(d) == K for d in c.drafts) for c in done.completions]
    assert len(full) == sum(sizes)
    experts = measure_experts(Reader(engine, K), done.completions, K)
    assert experts is not None
    assert (experts.num_experts, experts.experts_per_token) == (8, 2)
    assert [layer.layer for layer in experts.layers] == ["model.layers.1"], "layer 0 is dense"
    points = experts.layers[0].points
    assert [p.num_tokens for p in points] == [1, 2, 3, 4, 8, 16]
    assert experts.mean == points
    limits = np.cumsum([0, *sizes])
    for p in points[: K + 1]:
        counts = [len({e for row in run[: p.num_tokens] for e in row}) for run in full]
        by_request = [np.mean(counts[a:b]) for a, b in itertools.pairwise(limits)]
        assert p.measured.value == pytest.approx(np.mean(by_request))
        assert p.expected == pytest.approx(8 * (1 - 0.75**p.num_tokens))
    assert points[0].measured.value == 2
    for p in points:
        assert p.measured.low is not None
        assert p.measured.high is not None
        assert p.measured.value is not None
        assert p.measured.low <= p.measured.value <= p.measured.high <= 8


def test_even_and_independent_choices_give_the_formula() -> None:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(16)[:2] for _ in range(2 * 60 * 20 * 4)]).reshape(2, 60 * 20, 4, 2)
    chosen = [_membership(ids[:, 20 * i : 20 * (i + 1)], 4, 16) for i in range(60)]
    for t, counts in _grouped(chosen, 4, random.Random(0)).items():
        assert counts.shape == (60 // -(-t // 4), 2)
        assert counts.mean() == pytest.approx(16 * (1 - (7 / 8) ** t), abs=0.15)


def test_groups_have_no_request_in_common_and_are_four_at_least() -> None:
    """Request i always chooses expert i, so that a group of n requests chooses n experts."""
    chosen = [np.zeros((3, 1, 2, 40), np.bool_) for _ in range(19)]
    for i, c in enumerate(chosen):
        c[..., i] = True
    found = _grouped(chosen, 2, random.Random(1))
    assert {t: (c.shape[0], c.mean()) for t, c in found.items()} == {8: (4, 4)}, "16 tokens would need 32 requests"


def test_without_whole_chains_there_is_nothing_to_measure(tmp_path: Path) -> None:
    engine = Engine.from_pretrained(write_planted_checkpoint(tmp_path), kernels="reference")
    assert measure_experts(Reader(engine, K), [Completion([1, 2, 3], 0, [2], [[5]])], K) is None
