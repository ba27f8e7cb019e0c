"""Coupled verification: the output is the target's own sample, whatever the drafts are."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.kernels import rules
from specdec.kernels.decisions import RowSampling
from specdec.kernels.philox import gumbel_noise
from specdec.step import draft, verify
from support.enumeration import Enumerator, RandomModel
from support.fakes import NEEDS_COMPILER, write_planted_checkpoint
from support.laws import EVERYTHING, LAW_FIELDS, defined_law

VOCAB_SIZE, PROMPT, NUM_TOKENS = 5, [1, 3], 12
COUPLED = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, speculation=SpeculationParams(3, "coupled"))


@pytest.fixture
def tables(tmp_path: Path) -> Enumerator:
    return Enumerator(tmp_path, RandomModel(VOCAB_SIZE, 7, zeros=0.1), RandomModel(VOCAB_SIZE, 8, zeros=0.1))


def own_sample(tables: Enumerator, params: SamplingParams) -> list[int]:
    """By definition: x_t = argmax of log p + G[t] with the target's noise of the absolute position t."""
    law, tokens = defined_law(tables.kernels.tables[0], params, PROMPT), list(PROMPT)
    for position in range(len(PROMPT), len(PROMPT) + NUM_TOKENS):
        probs = law(tuple(tokens))
        if probs.sum() == 0:
            break
        noise = torch.from_numpy(gumbel_noise([params.seed], [0], [position], [0], VOCAB_SIZE))[0]
        tokens.append(int((probs.log() + noise).argmax()))
    return tokens[len(PROMPT) :]


def outputs_are_own_samples(tables: Enumerator, num_seeds: int = 40, **fields: object) -> bool:
    params = [
        replace(COUPLED, seed=2**63 + 977 * i, speculation=SpeculationParams(i % 6, "coupled", drafts), **fields)
        for i, drafts in zip(range(num_seeds), itertools.cycle(["sampled", "greedy"]))
    ]
    outputs = tables.engine.generate([PROMPT] * num_seeds, params)
    assert sum(o.stats.num_accepted_tokens for o in outputs) > 20
    return [o.token_ids for o in outputs] == [own_sample(tables, p) for p in params]


def test_the_output_is_the_targets_own_sample_path_by_path(tables: Enumerator) -> None:
    assert outputs_are_own_samples(tables)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAW_FIELDS, "everything"])
def test_it_is_under_every_parameter(tables: Enumerator, name: str) -> None:
    fields = {**LAW_FIELDS, "everything": EVERYTHING}[name]
    assert outputs_are_own_samples(tables, **fields)
    changed, plain = (
        [own_sample(tables, replace(COUPLED, seed=seed, **f)) for seed in range(40)] for f in (fields, {})
    )
    assert changed != plain


def test_no_field_is_forgotten() -> None:
    """Those that do not change the law have their tests in test_generate.py and test_text.py."""
    others = {
        "max_tokens", "stop", "include_stop_str_in_output", "stop_token_ids", "ignore_eos", "skip_special_tokens",
        "seed", "logprobs", "speculation", "n",
    }  # fmt: skip
    assert {f.name for f in fields(SamplingParams)} == others | LAW_FIELDS.keys()


def match_probability(tables: Enumerator, context: tuple[int, ...]) -> float:
    """Daliri et al. 2024: sum_v 1 / sum_w max(p_w / p_v, q_w / q_v)."""
    p, q = (model.logits(context).softmax(-1).numpy() for model in tables.kernels.tables)
    possible = (p > 0) & (q > 0)
    ratios = np.maximum(p[None] / p[possible, None], q[None] / q[possible, None])
    return float((1 / ratios.sum(-1)).sum())


def first_draft_acceptance(tables: Enumerator) -> tuple[float, float, float]:
    """Measured over seeds, exact, and the half-width of the 99 % interval."""
    num_seeds = 6000
    speculation = SpeculationParams(1, "coupled")
    params = [replace(COUPLED, max_tokens=3, seed=seed, speculation=speculation) for seed in range(num_seeds)]
    outputs = tables.engine.generate([PROMPT] * num_seeds, params)
    accepted = np.mean([o.stats.accepted_per_position[0] / o.stats.drafted_per_position[0] for o in outputs])
    first = tables.kernels.tables[0].logits(tuple(PROMPT)).softmax(-1).tolist()
    exact = sum(p * match_probability(tables, (*PROMPT, t)) for t, p in enumerate(first) if p > 0)
    return float(accepted), exact, 2.576 * (exact * (1 - exact) / num_seeds) ** 0.5


@pytest.mark.slow
def test_acceptance_is_the_closed_form(tables: Enumerator) -> None:
    measured, exact, width = first_draft_acceptance(tables)
    assert 0.2 < exact < 0.9
    assert abs(measured - exact) < width


def shift_positions(rows: Callable[..., RowSampling]) -> Callable[..., RowSampling]:
    def shifted(*given: object) -> RowSampling:
        sampling = rows(*given)
        return replace(sampling, positions=[position + 1 for position in sampling.positions])

    return shifted


@pytest.mark.slow
def test_mutants_with_noise_of_the_next_position_are_seen(tables: Enumerator, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(verify, "row_sampling", shift_positions(verify.row_sampling))
        assert not outputs_are_own_samples(tables)
    with monkeypatch.context() as patch:
        patch.setattr(draft, "row_sampling", shift_positions(draft.row_sampling))
        assert outputs_are_own_samples(tables), "drafts never change the output"
        measured, exact, width = first_draft_acceptance(tables)
        assert abs(measured - exact) > 2 * width


def test_mutant_that_emits_drafts_is_seen(tables: Enumerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "match_choices", lambda choices, drafts: [*drafts, choices[-1]])
    assert not outputs_are_own_samples(tables)


COMBINATIONS: list[dict[str, object]] = [
    {},
    {"top_k": 12, "top_p": 0.9},
    {"min_p": 0.05},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"logit_bias": {5: 2.0, 9: float("-inf")}, "bad_words": ((40,), (3, 4)), "min_tokens": 9},
]


@pytest.mark.slow
@NEEDS_COMPILER
def test_tokens_depend_on_the_seed_alone(tmp_path: Path) -> None:
    """Seeds over temperatures, parameters, K, drafts and batches in random order: zero differences from K = 0 alone."""
    engine = Engine.from_pretrained(write_planted_checkpoint(tmp_path, noise=0.7), kernels="cpu", max_num_seqs=32)
    rng = random.Random(0)
    cases = list(itertools.product([0.3, 0.7, 1.0, 1.5], COMBINATIONS, range(5)))
    prompts = [[rng.randrange(3, 259) for _ in range(rng.randint(1, 20))] for _ in cases]
    params = [
        SamplingParams(temperature=t, max_tokens=40, seed=seed, ignore_eos=True, **fields)
        for seed, (t, fields, _) in enumerate(cases)
    ]  # fmt: skip
    plain = [replace(p, speculation=SpeculationParams(0)) for p in params]
    expected = [engine.generate([prompt], p)[0].token_ids for prompt, p in zip(prompts, plain)]
    drafted = accepted = 0
    for k in range(9):
        order = rng.sample(range(len(cases)), len(cases))
        speculation = [SpeculationParams(k, "coupled", rng.choice(["sampled", "greedy"])) for _ in order]
        size = rng.choice([1, 7, 32]) if k else 32
        for first in range(0, len(order), size):
            chunk = order[first : first + size]
            outputs = engine.generate(
                [prompts[i] for i in chunk], [replace(params[i], speculation=speculation[i]) for i in chunk]
            )
            assert [o.token_ids for o in outputs] == [expected[i] for i in chunk], f"K = {k}, batch {size}"
            drafted += sum(o.stats.num_draft_tokens for o in outputs)
            accepted += sum(o.stats.num_accepted_tokens for o in outputs)
    assert 0.1 < accepted / drafted < 0.95
