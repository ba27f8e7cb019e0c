"""The check of an engine's acceptance against the model's own laws: exact on tables of logits, and it sees every broken
MTP path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import specdec.step.commit
import specdec.step.draft
from specdec import Engine, SpeculationParams
from specdec.eval.acceptance.analyse import Completion, analyse
from specdec.eval.acceptance.generate import Request, Round, analysed, run_turn
from specdec.eval.acceptance.metrics import Check, cell_metrics
from specdec.eval.acceptance.plan import AcceptanceOptions, Cell
from specdec.eval.acceptance.replay import Reader
from specdec.eval.acceptance.run import with_exact_drafts
from specdec.eval.prompts import load_stdlib
from specdec.kernels.data import HiddenRows
from specdec.step.draft import MTPDrafts
from support.enumeration import Enumerator, RandomModel, RandomPath
from support.fakes import NEEDS_COMPILER

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB_SIZE, PROMPT, K = 5, [1, 3], 3
EXACT = 1e-12


@pytest.fixture
def tables(tmp_path: Path) -> Enumerator:
    return Enumerator(tmp_path, RandomModel(VOCAB_SIZE, 7, zeros=0.1), RandomModel(VOCAB_SIZE, 8, zeros=0.1))


def coupled_match(p: np.ndarray, q: np.ndarray) -> float:
    """Daliri et al. 2024."""
    possible = (p > 0) & (q > 0)
    return float((1 / np.maximum(p[None] / p[possible, None], q[None] / q[possible, None]).sum(-1)).sum())


def acceptance_by_definition(
    rule: str, greedy: bool, temperature: float, p: np.ndarray, q: np.ndarray, token: int, reached: float
) -> float:
    """The given draft `token` stands for the argmax of greedy drafts. reached: min(1, ..) of the drafts before."""
    if temperature == 0:
        return float(p.argmax() == token)
    if greedy:
        return float(p[token])
    if rule == "coupled":
        return coupled_match(p, q)
    return float(np.minimum(p, q / reached if rule == "block" else q).sum())


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("drafts", ["sampled", "greedy"])
@pytest.mark.parametrize("rule", ["coupled", "block", "token"])
def test_expected_acceptance_is_that_of_the_tables(
    tables: Enumerator, rule: Any, drafts: Any, temperature: float
) -> None:
    """At arbitrary contexts and drafts, with the logits from which the model itself is made."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(VOCAB_SIZE, size=12).tolist()
    starts = [2, 5, 9, 12]
    given = [rng.integers(VOCAB_SIZE, size=k).tolist() for k in (K, 1, K, 2)]
    tables.kernels.paths = [RandomPath([]) for _ in range(4)]  # draws are not asked for
    speculation = SpeculationParams(K, rule, drafts)
    (a,) = analyse(Reader(tables.engine, K), [Completion(tokens, 3, starts, given)], temperature, speculation)
    scale, (target, draft) = 1 / (temperature or 1), tables.kernels.tables
    num_joint = 0
    for row, (start, ids) in enumerate(zip(starts, given)):
        reached = 1.0
        for i, token in enumerate(ids):
            context = (*tokens[:start], *ids[:i])
            p, q = ((model.logits(context) * scale).softmax(-1).numpy() for model in (target, draft))
            if reached > 0:
                expected = acceptance_by_definition(rule, drafts == "greedy", temperature, p, q, token, reached)
                assert a.expected[row, i] == pytest.approx(expected, abs=EXACT)
            num_joint += 0 < reached < 1
            reached = min(1.0, reached * p[token] / q[token]) if q[token] > 0 else 0.0
            assert a.confidence[row, i] == pytest.approx(q.max(), abs=EXACT)
            assert a.entropy[row, i] == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum(), abs=EXACT)
            if temperature > 0 and drafts == "sampled":
                assert a.alpha[row, i] == pytest.approx(np.minimum(p, q).sum(), abs=EXACT)
    assert num_joint > 0
    assert a.indices.tolist() == [0, 1, 2, 3]
    assert np.isnan(a.alpha[1, 1:]).all()


def request_batch(prompts: list[list[int]]) -> list[Request]:
    return [Request(i, "text", 0, tokens) for i, tokens in enumerate(prompts)]


def check_of(
    engine: Engine, reader: Reader, prompts: list[list[int]], rule: str, *, temperature: float = 1.0, k: int = K,
    max_tokens: int = 48, drafts: str = "sampled",
) -> Check:  # fmt: skip
    """What the benchmark says about one cell."""
    greedy = temperature == 0
    cell = Cell(temperature, 16, "greedy" if greedy else rule, "greedy" if greedy else drafts, k)
    done = Round([], [])
    run_turn(engine, AcceptanceOptions(max_tokens=max_tokens, check_contexts=1), cell, request_batch(prompts), 0, done)
    metrics = cell_metrics(cell, analysed(done, reader, cell, 10**6), [], [done.wall_s])
    assert metrics.check is not None
    return with_exact_drafts(metrics.check)


@pytest.mark.slow
def test_a_sound_engine_passes_on_tables(tables: Enumerator) -> None:
    """Coupled verification, whose noise is the engine's own there."""
    check = check_of(tables.engine, Reader(tables.engine, K), [PROMPT] * 400, "coupled", max_tokens=14)
    assert check.passed, check.message
    assert check.num_contexts > 500
    assert len(check.positions) == K
    assert all(0.1 < p.expected < 0.9 for p in check.positions)


@pytest.fixture(scope="module")
def bundled() -> Engine:
    return Engine.from_pretrained("bundled", prefix_caching=False, kernels="cpu")


@pytest.fixture(scope="module")
def prompts(bundled: Engine) -> list[list[int]]:
    return [bundled.checkpoint.encode(p.prompt)[-40:] for p in load_stdlib()[:24]]


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("rule", "temperature", "drafts"),
    [("coupled", 1.0, "sampled"), ("block", 1.0, "sampled"), ("token", 0.6, "sampled"), ("token", 1.0, "greedy"),
     ("coupled", 0.0, "greedy")],
)  # fmt: skip
def test_the_bundled_checkpoint_passes(
    bundled: Engine, prompts: list[list[int]], rule: str, temperature: float, drafts: str
) -> None:
    check = check_of(bundled, Reader(bundled, K), prompts, rule, temperature=temperature, drafts=drafts)
    assert check.passed, check.message
    assert check.num_other_drafts == 0
    assert check.num_contexts > 250


def shifted_hidden(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    """The hidden states of the tokens one before."""
    commit = specdec.step.commit._commit_cache_rows

    def wrong(sequence: Any, num_rows: int, hidden: HiddenRows) -> None:
        commit(sequence, num_rows, HiddenRows(hidden.tensor().roll(1, 0), 0, hidden.num_rows))

    patch.setattr(specdec.step.commit, "_commit_cache_rows", wrong)


def stale_rows(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    """Rows that drafting wrote stay: the extend runs the last pair only."""
    chain = MTPDrafts._chain

    def shortened(s: Any) -> Any:
        ((hidden, first, num_rows),) = s.pending_hidden
        skipped = num_rows - 1 if s.num_mtp_tokens > 0 else 0
        rows = HiddenRows(hidden, first + skipped, num_rows - skipped)
        return replace_fields(s, num_mtp_tokens=s.num_mtp_tokens + skipped, pending_hidden=[rows])

    def wrong(self: MTPDrafts, scheduled: Any) -> Any:
        return chain(self, [replace(s, sequence=shortened(s.sequence)) for s in scheduled])

    patch.setattr(MTPDrafts, "_chain", wrong)


def no_prompt_pairs(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    """The MTP layer forgets the prompt after its first drafts."""
    draft = MTPDrafts.draft

    def wrong(self: MTPDrafts, scheduled: Any) -> Any:
        for s in (s.sequence for s in scheduled):
            if s.num_mtp_tokens > 0:
                self.kv_cache[0, s.page_table[: len(s.prompt_token_ids) // self.page_size]] = 0
        return draft(self, scheduled)

    patch.setattr(MTPDrafts, "draft", wrong)


def recycled_before_the_norm(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    patch.setattr(engine.core.drafter, "recycling", "pre_norm")


def noise_of_the_position_before(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    rows = specdec.step.draft.row_sampling

    def wrong(*given: Any) -> Any:
        sampling = rows(*given)
        return replace(sampling, positions=[p - 1 for p in sampling.positions])

    patch.setattr(specdec.step.draft, "row_sampling", wrong)


class replace_fields:
    """A sequence with some attributes in place of its own."""

    def __init__(self, sequence: Any, **fields: Any) -> None:
        self.__dict__.update({"sequence": sequence, **fields})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sequence, name)


MUTANTS = [shifted_hidden, stale_rows, no_prompt_pairs, recycled_before_the_norm, noise_of_the_position_before]


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_mtp_path_fails(
    bundled: Engine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch,
    mutant: Callable[[pytest.MonkeyPatch, Engine], None],
) -> None:  # fmt: skip
    """Outputs stay right under coupled verification; drafts are not the model's own, and that is said."""
    reader = Reader(bundled, K)
    with monkeypatch.context() as patch:
        mutant(patch, bundled)
        check = check_of(bundled, reader, prompts, "coupled")
    assert not check.passed
    assert "drafts are not those of the MTP layer" in check.message
    assert check_of(bundled, reader, prompts[:4], "coupled").passed


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("mutant", [shifted_hidden, no_prompt_pairs, noise_of_the_position_before])
def test_acceptance_alone_shows_what_matters(
    bundled: Engine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch,
    mutant: Callable[[pytest.MonkeyPatch, Engine], None],
) -> None:  # fmt: skip
    """On kernels that are not row-invariant a draft may differ by rounding; the count of accepted ones still tells."""
    with monkeypatch.context() as patch:
        mutant(patch, bundled)
        check = check_of(bundled, Reader(bundled, K), prompts, "coupled", max_tokens=64)
    assert any(p.z is not None and p.z < -4 for p in check.positions), check.message
