"""Every rule keeps the target's law: exactly, by enumeration through the engine; and tests that would see it if not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from specdec import SamplingParams, SpeculationParams
from specdec.kernels import rules
from specdec.kernels.decisions import GREEDY, Drafts, LogitEdits, Residuals, RowSampling
from specdec.kernels.rules import Proposal
from specdec.request.seeds import Stream
from specdec.step import draft
from specdec.step.draft import MTPDrafts
from support.enumeration import (
    Context,
    Enumerator,
    NoiseUsedTwice,
    RandomModel,
    TableKernels,
    completed,
    distance,
    rejection_law,
    target_law,
)
from support.laws import EVERYTHING, LAW_FIELDS, PLAIN, defined_law

EXACT = 1e-12


def request_law(model: RandomModel, params: SamplingParams, prompt: list[int]) -> dict[Context, float]:
    """The law of whole outputs, which may end early."""
    law = defined_law(model, params, prompt)
    ended: dict[Context, float] = {}
    running: dict[Context, float] = {(): 1.0}
    for _ in range(params.max_tokens):
        longer = {}
        for tokens, probability in running.items():
            following = law((*prompt, *tokens)).tolist()
            if sum(following) == 0:
                ended[tokens] = probability
            longer |= {(*tokens, t): probability * p for t, p in enumerate(following) if p > 0}
        running = longer
    return ended | running


def enumerator(folder: Path, vocab_size: int, seed: int, zeros: float = 0.2) -> Enumerator:
    return Enumerator(
        folder, RandomModel(vocab_size, seed, zeros=zeros), RandomModel(vocab_size, 1000 + seed, zeros=zeros)
    )


def error_of(engine: Enumerator, params: SamplingParams, prompt: tuple[int, ...] = (1,)) -> float:
    """How far the engine's law is from the target's."""
    expected = request_law(engine.kernels.tables[0], params, list(prompt))
    assert abs(sum(expected.values()) - 1) < EXACT
    law = engine.law(list(prompt), params)
    assert abs(sum(law.values()) - 1) < EXACT
    return distance(law, expected)


# Vocabulary, K, tokens: always more than one iteration.
SIZES = [(2, 1, 5), (2, 3, 6), (2, 4, 6), (3, 2, 5), (4, 2, 4), (4, 3, 4), (5, 1, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("draft_sampling", ["sampled", "greedy"])
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(("vocab_size", "k", "num_tokens"), SIZES)
def test_rejection_keeps_the_targets_law_through_the_engine(
    tmp_path: Path, vocab_size: int, k: int, num_tokens: int, rule: str, draft_sampling: str
) -> None:
    speculation = SpeculationParams(k, rule, draft_sampling)
    for seed in range(2):
        engine = enumerator(tmp_path / str(seed), vocab_size, seed)
        assert error_of(engine, replace(PLAIN, max_tokens=num_tokens, speculation=speculation)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("draft_sampling", ["sampled", "greedy"])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_chains_that_end_on_low_confidence_keep_the_law(tmp_path: Path, rule: str, draft_sampling: str) -> None:
    """The threshold lies where some chains end early, some at once, and some not."""
    for seed, (vocab_size, k, num_tokens, confidence) in enumerate([(3, 2, 5, 0.5), (2, 3, 5, 0.6), (4, 2, 4, 0.4)]):
        engine = enumerator(tmp_path / str(seed), vocab_size, seed, zeros=0.0)
        speculation = SpeculationParams(k, rule, draft_sampling, min_draft_confidence=confidence)
        params = replace(PLAIN, max_tokens=num_tokens, speculation=speculation)
        lengths = set()
        verified = engine.engine.core.verifier.verify

        def recording(
            scheduled: object, drafts: Drafts, lengths: set[int] = lengths, verified: object = verified
        ) -> object:
            lengths.update(map(len, drafts.token_ids))
            return verified(scheduled, drafts)

        engine.engine.core.verifier.verify = recording
        assert error_of(engine, params) < EXACT
        assert {0, 1, k} <= lengths, lengths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "rule", "draft_sampling"),
    [(0, "token", "sampled"), *((2, *x) for x in itertools.product(["token", "block"], ["sampled", "greedy"]))],
)
@pytest.mark.parametrize("name", [*LAW_FIELDS, "everything"])
def test_every_field_changes_the_law_as_defined(
    tmp_path: Path, name: str, k: int, rule: str, draft_sampling: str
) -> None:
    fields = {**LAW_FIELDS, "everything": EVERYTHING}[name]
    engine = enumerator(tmp_path, 4, seed=5, zeros=0.1)
    speculation = SpeculationParams(k, rule, draft_sampling)
    params = replace(PLAIN, max_tokens=4, speculation=speculation, **fields)
    assert error_of(engine, params) < EXACT
    default = {field: value for field, value in fields.items() if field in ("ignore_eos", "stop_token_ids")}
    unchanged = request_law(engine.kernels.tables[0], replace(PLAIN, max_tokens=4, **default), [1])
    assert distance(request_law(engine.kernels.tables[0], params, [1]), unchanged) > 0.01, "the field does nothing here"


@pytest.mark.slow
@pytest.mark.parametrize("greedy_drafts", [False, True], ids=["sampled", "one-hot"])
@pytest.mark.parametrize(("vocab_size", "k"), [(2, 4), (3, 3), (5, 2), (5, 3), (4, 4)])
def test_one_iteration_keeps_the_law_and_block_accepts_more(vocab_size: int, k: int, greedy_drafts: bool) -> None:
    for seed in range(3):
        p, q = (RandomModel(vocab_size, s, zeros=0.3) for s in (seed, 1000 + seed))

        def law(context: Context, p: RandomModel = p) -> Tensor:
            return p.logits(context).softmax(-1)

        context, accepted = (0,), {}
        exact = target_law(law, context, k + 1)
        for block in (False, True):
            emitted, accepted[block] = rejection_law(p, q, context, k, block=block, greedy_drafts=greedy_drafts)
            assert distance(completed(emitted, law, context, k + 1), exact) < EXACT
        if greedy_drafts:
            assert accepted[True] == pytest.approx(accepted[False], abs=EXACT)
        else:
            assert accepted[True] >= accepted[False] - EXACT


@pytest.mark.slow
def test_the_largest_instance() -> None:
    """Vocabulary 5, K = 4: iterations that start from every last token, so that the law of two is theirs composed."""

    class LastToken(RandomModel):
        def logits(self, context: Context) -> Tensor:
            return super().logits(context[-1:])

    p, q = LastToken(5, 3, zeros=0.25), LastToken(5, 4, zeros=0.25)
    laws, exact = {}, {}
    for token in range(5):
        for block in (False, True):
            laws[token, block], _ = rejection_law(p, q, (token,), 4, block=block, greedy_drafts=False)
        exact[token] = target_law(lambda c: p.logits(c).softmax(-1), (token,), 5)
    for (token, _), law in laws.items():
        whole = completed(law, lambda c: p.logits(c).softmax(-1), (token,), 5)
        assert distance(whole, exact[token]) < EXACT


Mutation = Callable[[pytest.MonkeyPatch], None]


def shared_draft_and_residual_noise(patch: pytest.MonkeyPatch) -> None:
    draw = rules._draw
    patch.setattr(
        rules, "_draw", lambda k, p, stream, at: draw(k, p, Stream.DRAFT if stream == Stream.RESIDUAL else stream, at)
    )


def wrong_q(patch: pytest.MonkeyPatch) -> None:
    """The law without the request's temperature."""
    drafted = MTPDrafts.draft

    def flatter(self: MTPDrafts, scheduled: object) -> Drafts:
        result = drafted(self, scheduled)
        return result if result.probs is None else replace(result, probs=result.probs.sqrt())

    patch.setattr(MTPDrafts, "draft", flatter)


def one_uniform_for_a_block(patch: pytest.MonkeyPatch) -> None:
    draw = rules._draw

    def same(kernels: object, proposals: list[Proposal], stream: Stream, at: list[tuple[int, int]]) -> list[float]:
        return draw(kernels, proposals, stream, [(b, 0) for b, _ in at] if stream == Stream.ACCEPT else at)

    patch.setattr(rules, "_draw", same)


def first_failure_stop_in_block(patch: pytest.MonkeyPatch) -> None:
    accepted = rules._accepted
    patch.setattr(rules, "_accepted", lambda k, p, t: accepted(k, [replace(x, block=False) for x in p], t))


def a_draft_dropped_for_its_own_low_q(patch: pytest.MonkeyPatch) -> None:
    drafted = MTPDrafts.draft

    def dropping(self: MTPDrafts, scheduled: object) -> Drafts:
        result = drafted(self, scheduled)
        for ids, row in zip(result.token_ids, result.prob_rows):
            low = [i for i, d in enumerate(ids) if row >= 0 and result.probs[row, i, d] < 0.4]
            del ids[low[0] if low else len(ids) :]
        return result

    patch.setattr(MTPDrafts, "draft", dropping)


def softmax_q_for_greedy_drafts(patch: pytest.MonkeyPatch) -> None:
    """The drafts are argmaxes, judged as if they had been drawn."""
    rows = draft.row_sampling
    patch.setattr(draft, "row_sampling", lambda sequences, streams: rows(sequences, [GREEDY] * len(streams)))


def penalties_blind_to_the_drafts(patch: pytest.MonkeyPatch) -> None:
    edit = TableKernels.edit_

    def blind(self: TableKernels, logits: Tensor, edits: list[LogitEdits | None], drafts: list[list[int]]) -> None:
        edit(self, logits, edits, [[] for _ in drafts])

    patch.setattr(TableKernels, "edit_", blind)


def residual_replaced_by_p(patch: pytest.MonkeyPatch) -> None:
    sample = TableKernels.sample_residual

    def from_p(self: TableKernels, laws: Residuals, uniforms: list[float]) -> list[int]:
        nothing = [-1] * len(uniforms)
        return sample(self, replace(laws, q_rows=nothing, excluded=nothing), uniforms)

    patch.setattr(TableKernels, "sample_residual", from_p)


def without_starts(sampling: RowSampling) -> RowSampling:
    return replace(sampling, starts=[0] * len(sampling))


def noise_reused_across_iterations(patch: pytest.MonkeyPatch) -> None:
    rows = draft.row_sampling
    patch.setattr(draft, "row_sampling", lambda *given: without_starts(rows(*given)))


def uniforms_reused_across_iterations(patch: pytest.MonkeyPatch) -> None:
    uniforms = TableKernels.uniforms

    def unkeyed(self: TableKernels, seeds: list[int], stream: int, at: list[int], starts: list[int]) -> list[float]:
        return uniforms(self, seeds, stream, at, [0] * len(starts))

    patch.setattr(TableKernels, "uniforms", unkeyed)


def bonus_from_the_wrong_row(patch: pytest.MonkeyPatch) -> None:
    residuals = rules._residuals

    def shifted(
        p: Tensor, q: Tensor, proposals: list[Proposal], reached: object, laws: list[tuple[int, int]]
    ) -> Residuals:
        law = residuals(p, q, proposals, reached, laws)
        bonus = [i > 0 and i == len(proposals[b].draft_token_ids) for b, i in laws]
        return replace(law, p_rows=[row - late for row, late in zip(law.p_rows, bonus)])

    patch.setattr(rules, "_residuals", shifted)


MUTANTS: list[tuple[Mutation, str]] = [
    (shared_draft_and_residual_noise, "token"),
    (shared_draft_and_residual_noise, "block"),
    (wrong_q, "token"),
    (wrong_q, "block"),
    (one_uniform_for_a_block, "token"),
    (one_uniform_for_a_block, "block"),
    (first_failure_stop_in_block, "block"),
    (a_draft_dropped_for_its_own_low_q, "token"),
    (a_draft_dropped_for_its_own_low_q, "block"),
    (softmax_q_for_greedy_drafts, "token"),
    (softmax_q_for_greedy_drafts, "block"),
    (penalties_blind_to_the_drafts, "token"),
    (penalties_blind_to_the_drafts, "block"),
    (residual_replaced_by_p, "token"),
    (residual_replaced_by_p, "block"),
    (noise_reused_across_iterations, "token"),
    (noise_reused_across_iterations, "block"),
    (uniforms_reused_across_iterations, "token"),
    (uniforms_reused_across_iterations, "block"),
    (bonus_from_the_wrong_row, "token"),
    (bonus_from_the_wrong_row, "block"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mutate", "rule"), MUTANTS, ids=[f"{m.__name__}-{rule}" for m, rule in MUTANTS])
def test_mutants_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutate: Mutation, rule: str) -> None:
    engine = enumerator(tmp_path, 3, seed=1, zeros=0.1)
    fields = {"presence_penalty": 0.8, "frequency_penalty": 0.6} if "penalties" in mutate.__name__ else {}
    params = replace(PLAIN, max_tokens=4, speculation=SpeculationParams(2, rule), **fields)
    assert error_of(engine, params) < EXACT
    mutate(monkeypatch)
    if "noise" in mutate.__name__ or "uniform" in mutate.__name__:
        with pytest.raises(NoiseUsedTwice):
            error_of(engine, params)
    else:
        assert error_of(engine, params) > 1e-3
