"""Contexts looked at one by one or together give the rows that the engine itself had there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import specdec.kernels.rules
import specdec.kernels.speculation
from specdec import Engine, SamplingParams, SpeculationParams
from specdec.eval.acceptance import replay
from specdec.eval.acceptance.analyse import Completion, Drawing, analyse, laws_of, softmax
from specdec.eval.acceptance.replay import Context, Reader
from specdec.kernels.cpu import CpuKernels
from specdec.kernels.rules import Proposal, verify_by_rejection
from support.fakes import EXACT_DTYPES, KERNELS, NEEDS_COMPILER, write_planted_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
K = 4
PROMPTS = [
    "def f(x):",
    "class Stack:\n    def push",
    "a",
    "import os\n\n\nfor name in os.listdir('.'):\n    print(name)",
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drafts are accepted now and then."""
    return write_planted_checkpoint(tmp_path_factory.mktemp("planted") / "checkpoint")


@dataclass(frozen=True)
class Verified:
    """What the engine's rule saw of one request's verification."""

    drafts: list[int]
    p: Tensor  # [k, V]
    q: Tensor | None


def generate(
    engine: Engine, speculation: SpeculationParams, temperature: float, max_tokens: int = 24
) -> list[Completion]:
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=True, speculation=speculation)
    with engine.core.traced() as trace:
        outputs = engine.generate(PROMPTS, [replace(params, seed=seed) for seed in range(len(PROMPTS))])
    completions = []
    for output in outputs:
        verified = [v for v in trace if v.request_id == output.request_id and v.draft_token_ids]
        completions.append(
            Completion(
                output.prompt_token_ids + output.token_ids,
                output.seed,
                [v.start for v in verified],
                [v.draft_token_ids for v in verified],
            )
        )
    return completions


def generate_and_watch(
    engine: Engine, speculation: SpeculationParams, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Completion], dict[tuple[int, int], Verified]]:
    """-> completions, and by (seed, start) what a rejection rule saw."""
    seen: dict[tuple[int, int], Verified] = {}

    def watching(kernels: Any, p: Tensor, q: Tensor | None, proposals: list[Proposal]) -> list[list[int]]:
        for x in proposals:
            k = len(x.draft_token_ids)
            laws = None if q is None or x.prob_row < 0 else q[x.prob_row, :k].clone()
            seen[x.seed, x.start] = Verified(x.draft_token_ids, p[x.first_row : x.first_row + k].clone(), laws)
        return verify_by_rejection(kernels, p, q, proposals)

    with monkeypatch.context() as patch:
        patch.setattr(CpuKernels, "verify", specdec.kernels.speculation.verify)
        patch.setattr(specdec.kernels.rules, "verify_by_rejection", watching)
        return generate(engine, speculation, 0.8), seen


@pytest.mark.slow
@pytest.mark.parametrize("drafts", ["sampled", "greedy"])
@pytest.mark.parametrize("recycling", ["post_norm", "pre_norm"])
@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        ("reference", "float64"),
        pytest.param("cpu", "float32", marks=NEEDS_COMPILER),
        pytest.param("cpu", "bfloat16", marks=NEEDS_COMPILER),
    ],
)
def test_laws_and_drafts_are_the_engines_own(
    planted: Path, monkeypatch: pytest.MonkeyPatch, kernels: str, dtype: str, recycling: str, drafts: Any
) -> None:
    engine = Engine.from_pretrained(planted, kernels=kernels, dtype=dtype, mtp_recycling=recycling, page_size=5)
    speculation = SpeculationParams(K, "block", drafts)
    completions, seen = generate_and_watch(engine, speculation, monkeypatch)
    reader, drawing, compared = Reader(engine, K), Drawing(0.8, speculation), 0
    exact = kernels == "cpu"
    texts = reader.read([c.token_ids for c in completions])
    for text, completion in zip(texts, completions):
        for start, given in zip(completion.starts, completion.drafts):
            rows = drawing.rows([completion.seed], [start])
            chains = reader.chains([Context(text, start)], rows, len(given))
            assert chains.drafts[0].tolist() == given
            theirs = seen[completion.seed, start]
            assert theirs.drafts == given
            p, q = laws_of(chains, drawing, reader.kernels)
            assert (q is None) == (theirs.q is None) == (drafts == "greedy")
            for ours, law in ((p, theirs.p), (q, theirs.q)):
                if ours is not None and law is not None:
                    limit = 0 if exact else 1e-12
                    assert torch.allclose(ours[0], law.double(), rtol=0, atol=limit)
                    compared += 1
    assert compared > 40


@NEEDS_COMPILER
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rule", ["coupled", "token"])
def test_drafts_of_every_rule_are_the_engines_own(planted: Path, rule: Any, temperature: float) -> None:
    engine = Engine.from_pretrained(planted, kernels="cpu")
    reader = Reader(engine, K)
    for speculation in (SpeculationParams(K, rule), SpeculationParams(2, rule, "greedy")):
        completions = generate(engine, speculation, temperature)
        analyses = analyse(reader, completions, temperature, speculation)
        assert sum(a.num_other_drafts for a in analyses) == 0
        assert sum(len(a.indices) for a in analyses) > 20
        k = speculation.num_speculative_tokens
        for completion, a in zip(completions, analyses):
            for i, drafts in enumerate(completion.drafts):
                assert np.isnan(a.alpha[i, len(drafts) :]).all()
                assert not np.isnan(a.alpha[i, : len(drafts)]).any()
                assert a.alpha.shape == (len(completion.drafts), k)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS)
def test_contexts_together_are_contexts_alone(planted: Path, monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    engine = Engine.from_pretrained(planted, kernels=kernels, dtype=EXACT_DTYPES[kernels])
    speculation = SpeculationParams(K, "token")
    completions = generate(engine, speculation, 0.8)
    together = analyse(Reader(engine, K), completions, 0.8, speculation)
    with monkeypatch.context() as patch:
        patch.setattr(replay, "LOGITS_ELEMENTS", 2 * K * 259 * 3)  # three contexts
        patch.setattr(replay, "PREFILL_ROWS", 7)
        small = Reader(engine, K)
        small.capacity = 90
        assert small.max_contexts == 3
        assert len(list(small.groups([c.token_ids for c in completions]))) > 1
        alone = analyse(small, completions, 0.8, speculation)
    for a, b in zip(together, alone):
        for name in ("expected", "confidence", "entropy", "alpha"):
            ours, theirs = getattr(a, name), getattr(b, name)
            assert np.allclose(ours, theirs, rtol=0, atol=0 if kernels == "cpu" else 1e-12, equal_nan=True)


def test_given_drafts_condition_what_follows_and_choices_say_what_would_be_drafted(planted: Path) -> None:
    """A wrong first draft leads to other laws after it, those of the context that ends in it."""
    engine = Engine.from_pretrained(planted, kernels="reference", dtype="float64")
    reader, drawing = Reader(engine, 2), Drawing(1.0, SpeculationParams(2, "token"))
    tokens = engine.checkpoint.encode(PROMPTS[1])
    (text,) = reader.read([tokens])
    context = [Context(text, len(tokens))]
    rows = drawing.rows([5], [len(tokens)])
    free = reader.chains(context, rows, 2)
    assert torch.equal(free.choices, free.drafts)
    other = (free.drafts + 1) % 259
    given = reader.chains(context, rows, 2, other)
    assert torch.equal(given.drafts, other)
    assert torch.equal(given.choices[:, 0], free.drafts[:, 0])
    assert torch.allclose(given.target[:, 0], free.target[:, 0])
    (longer,) = reader.read([[*tokens, int(other[0, 0])]])
    after = reader.chains([Context(longer, len(tokens) + 1)], drawing.rows([5], [len(tokens) + 1]), 1)
    assert torch.allclose(given.target[0, 1], after.target[0, 0], atol=1e-5)


def test_a_context_at_the_end_of_the_positions_can_be_looked_at(planted: Path) -> None:
    """max_total_tokens clips the engine's own drafts there; the rows lie within the model's positions."""
    engine = Engine.from_pretrained(planted, kernels="reference", dtype="float64", max_model_len=30)
    speculation = SpeculationParams(K, "token")
    prompts = [list(range(3, 3 + 20))]
    with engine.core.traced() as trace:
        outputs = engine.generate(
            prompts, SamplingParams(max_tokens=64, temperature=0.8, seed=1, speculation=speculation)
        )
    verified = [v for v in trace if v.draft_token_ids]
    assert verified[-1].start + len(verified[-1].draft_token_ids) < 30
    completion = Completion(
        prompts[0] + outputs[0].token_ids, 1, [v.start for v in verified], [v.draft_token_ids for v in verified]
    )
    (analysis,) = analyse(Reader(engine, K), [completion], 0.8, speculation)
    assert analysis.num_other_drafts == 0


def test_greedy_laws_are_point_masses_and_confidence_is_of_the_softmax(planted: Path) -> None:
    engine = Engine.from_pretrained(planted, kernels="reference", dtype="float64")
    speculation = SpeculationParams(2)
    completions = generate(engine, speculation, 0.0)
    reader = Reader(engine, 2)
    analyses = analyse(reader, completions, 0.0, speculation)
    assert all(np.isin(a.expected[~np.isnan(a.expected)], [0, 1]).all() for a in analyses)
    (text,) = reader.read([completions[0].token_ids])
    start = completions[0].starts[0]
    chains = reader.chains([Context(text, start)], Drawing(0.0, speculation).rows([0], [start]), 2)
    assert chains.draft is not None
    largest = softmax(reader.kernels, chains.draft, 1.0).amax(-1)[0]
    assert analyses[0].confidence[0].tolist() == pytest.approx(largest.tolist(), rel=1e-5)
    assert 0.05 < analyses[0].confidence[0, 0] < 1


class Silent:
    def draft(self, requests: Any) -> list[list[int]]:
        return [[] for _ in requests]


def test_without_an_mtp_layer_there_are_the_targets_laws_after_given_drafts(planted: Path) -> None:
    own, usual = (
        Reader(Engine.from_pretrained(planted, kernels="reference", dtype="float64", drafter=drafter), 2)
        for drafter in (Silent(), None)
    )
    tokens, starts = list(range(3, 20)), [2, 9, 17]
    rows = Drawing(0.8, SpeculationParams(2, "token", "greedy")).rows([0, 1, 2], starts)
    given = torch.tensor([[7, 8], [100, 3], [5, 5]])
    found, expected = (
        reader.chains([Context(text, start) for start in starts], rows, 2, given)
        for reader in (own, usual)
        for (text,) in [reader.read([tokens])]
    )
    assert torch.equal(found.drafts, given)
    assert torch.allclose(found.target, expected.target, rtol=0, atol=1e-12)
    assert (found.draft, found.choices) == (None, None)
    assert own.cache.shape[0] == usual.cache.shape[0] - 1
    with pytest.raises(AssertionError, match="give drafts"):
        own.chains([Context(own.read([tokens])[0], 9)], rows.select([0], [0]), 2)
