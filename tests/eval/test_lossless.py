"""The certificate: its law is the documented one, its statistics are valid and powerful, and broken engines fail it."""

from __future__ import annotations

import json
import math
import random
import re
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.cli import app
from specdec.eval.dev.small import main as small_checkpoint_main
from specdec.eval.dev.small import write_small_checkpoint
from specdec.eval.lossless import Certificate, LosslessOptions, certify, equality, evidence
from specdec.eval.lossless.contexts import build_levels, visit_contexts
from specdec.eval.lossless.evidence import (
    PooledProcess,
    cell_probs,
    context_detectable,
    g_test,
    log_e_of_context,
    pooled_detectable,
    shifted,
)
from specdec.eval.lossless.law import PlainTarget, edited_logits, truncated_probs
from specdec.eval.lossless.plan import Combination, combinations, make_plan
from specdec.kernels import rules, speculation
from specdec.kernels.cpu import CpuKernels
from specdec.kernels.decisions import LogitEdits, Residuals
from specdec.request.logit_edits import RequestEdits
from support.fakes import EXACT_DTYPES, KERNELS, tiny_config, write_checkpoint
from support.laws import law_by_transformers

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("transformers")
OPTIONS = LosslessOptions(samples=320, num_speculative_tokens=2, comparison_prompts=1, comparison_seeds=1)


@pytest.fixture
def few_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "DRAFT_LENGTHS", (1, 3))
    monkeypatch.setattr(equality, "BATCH_SIZES", (1, 7))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    write_small_checkpoint(folder)
    return folder


def law(vocab_size: int, seed: int, sharpness: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(vocab_size, dtype=torch.float64, generator=generator)).softmax(0)


# --- The law -----------------------------------------------------------------------------------------------------


def test_the_law_is_that_of_transformers() -> None:
    rng = random.Random(0)
    for seed in range(300):
        v = 20
        logits = 3 * torch.randn(v, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        prompt, output = ([rng.randrange(v) for _ in range(n)] for n in (3, rng.randrange(5)))
        words = ((rng.randrange(v),), (output[-1] if output else prompt[-1], rng.randrange(v)), (*prompt, *output, 7))
        params = SamplingParams(
            max_tokens=9,
            temperature=rng.choice([0.5, 1.0, 1.7]),
            top_k=rng.choice([0, 1, 5, 12]),
            top_p=rng.choice([1.0, 0.9, 0.4]),
            min_p=rng.choice([0.0, 0.05, 0.4]),
            repetition_penalty=rng.choice([1.0, 1.3, 0.8]),
            logit_bias=rng.choice([None, {3: 2.5, 4: -1.0, 5: -math.inf}]),
            bad_words=rng.choice([(), words]),
            min_tokens=rng.choice([0, 2]),
            stop_token_ids=(1, 2),
        )
        z = edited_logits(logits[None], prompt, torch.tensor([output], dtype=torch.int64), params)
        ours, rounded = truncated_probs(z, params)
        torch.testing.assert_close(
            ours[0],
            law_by_transformers(params, frozenset(params.stop_token_ids), len(prompt), prompt + output, logits),
            rtol=1e-12,
            atol=1e-14,
        )
        assert not rounded.any()


def test_presence_and_frequency_count_the_output_alone() -> None:
    logits, params = torch.zeros(2, 5).double(), SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    z = edited_logits(logits, [0, 1], torch.tensor([[1, 1, 2], [3, 3, 3]]), params)
    assert z.tolist() == [[0, -1, -0.75, 0, 0], [0, 0, 0, -1.25, 0]]


def test_contexts_whose_cut_is_a_matter_of_rounding_are_seen() -> None:
    close = 1 + 1e-7
    for logits, params, rounded in (
        ([3.0, 1.0, close, 0.0], SamplingParams(top_k=2), True),
        ([3.0, 1.0, close, 0.0], SamplingParams(top_k=1), False),
        ([3.0, 1.0, close, 0.0], SamplingParams(top_k=3), False),
        ([3.0, 1.0, close, 0.0], SamplingParams(top_p=0.85), True),
        ([math.log(0.5), math.log(0.3), math.log(0.2)], SamplingParams(top_p=0.8), True),
        ([math.log(0.5), math.log(0.3), math.log(0.2)], SamplingParams(top_p=0.75), False),
        ([math.log(0.5), math.log(0.3), math.log(0.2)], SamplingParams(min_p=0.4), True),
        ([math.log(0.5), math.log(0.3), math.log(0.2)], SamplingParams(min_p=0.5), False),
    ):
        z = torch.tensor([logits], dtype=torch.float64)
        assert truncated_probs(z, params)[1].tolist() == [rounded], params


def test_combinations_use_every_parameter_that_changes_the_law() -> None:
    plain, used = SamplingParams(), set()
    for c in combinations(8, range(6), LosslessOptions()):
        used |= {name for name, value in vars(c.params).items() if value != getattr(plain, name)}
        assert json.dumps(c.described(), allow_nan=False)
    assert used == {
        "max_tokens", "ignore_eos", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "logit_bias", "bad_words", "min_tokens", "stop_token_ids",
    }  # fmt: skip


@pytest.mark.parametrize("kernels", KERNELS)
def test_contexts_are_visited_once_with_the_laws_of_a_forward_over_all_tokens(small: Path, kernels: str) -> None:
    engine = Engine.from_pretrained(
        small, kernels=kernels, dtype=EXACT_DTYPES[kernels], max_num_seqs=2, max_model_len=64
    )
    rng = np.random.default_rng(0)
    tokens = rng.choice(4, (300, 4), p=[0.6, 0.2, 0.1, 0.1])
    tokens[rng.random(300) < 0.2, 3] = -1
    groups, pooled, prompt = rng.integers(0, 3, 300), rng.random(300) < 0.2, [5, 6, 7]
    levels, num_contexts = build_levels(tokens, groups, pooled, 3, vocab_size=8)

    visits: Counter[tuple[Any, ...]] = Counter()
    from_pool: Counter[tuple[Any, ...]] = Counter()
    for row, group, chosen in zip(tokens.tolist(), groups.tolist(), pooled.tolist()):
        for depth in range(len(row) if row[-1] >= 0 else 3):
            visits[(group, *row[: depth + 1])] += 1
            from_pool[(group, *row[: depth + 1])] += chosen
    totals: Counter[tuple[Any, ...]] = Counter()
    for key, count in visits.items():
        totals[key[:-1]] += count
    assert [sum(k[0] == g for k in totals) for g in range(3)] == num_contexts.tolist()

    found: dict[tuple[Any, ...], int] = {}
    for depth, first, logits, outputs in visit_contexts(PlainTarget(engine, 40), prompt, levels, width=5):
        level = levels[depth]
        for i, output in enumerate(outputs.tolist()):
            whole = PlainTarget(engine, 10).logits_after([*prompt, *output])
            torch.testing.assert_close(logits[i], whole[0], rtol=1e-5, atol=1e-5)
            for e in np.flatnonzero(level.node == first + i).tolist():
                key = (int(level.group[e]), *output, int(level.next_token[e]))
                assert key not in found
                found[key] = int(level.count[e])
                assert level.pooled[e] == from_pool[key]
    assert all(visits[key] == count for key, count in found.items())
    missing = set(visits) - set(found)
    assert all(totals[key[:-1]] == 1 and from_pool[key] == 0 for key in missing)
    assert missing


# --- The statistics ----------------------------------------------------------------------------------------------


def test_the_e_process_of_a_context_is_the_formula() -> None:
    p, counts, g = torch.tensor([0.5, 0.3, 0.2, 0.0]).double(), torch.tensor([7, 0, 3, 0]), math.lgamma
    values = []
    for a in evidence.CONCENTRATIONS:
        seen = [(0.5, 7), (0.2, 3)]
        values.append(g(a) - g(a + 10) + sum(g(a * q + n) - g(a * q) - n * math.log(q) for q, n in seen))
    expected = math.log(sum(math.exp(v) for v in values) / len(values))
    assert float(log_e_of_context(p, counts)) == pytest.approx(expected, abs=1e-7)
    assert float(log_e_of_context(p, torch.tensor([0, 0, 1, 0]))) == pytest.approx(0, abs=1e-9), (
        "one visit says nothing"
    )
    assert log_e_of_context(p, torch.tensor([1000, 0, 0, 1])) == math.inf


@pytest.mark.slow
def test_under_the_law_e_has_mean_one_and_seldom_is_large() -> None:
    p, rng = law(12, 0), np.random.default_rng(1)
    e = log_e_of_context(p, torch.from_numpy(rng.multinomial(8, p.numpy(), 200_000))).exp()
    assert float(e.mean()) == pytest.approx(1, abs=0.03)
    counts = torch.from_numpy(rng.multinomial(400, p.numpy(), 40_000))
    e = log_e_of_context(p, counts).exp()  # its mean is 1 by rare and huge values
    assert 0.3 < float(e.mean()) < 3
    assert float((e >= 20).double().mean()) <= 0.05
    p_values, num_cells = g_test(p, counts)
    assert num_cells > 5
    assert float((p_values <= 0.01).double().mean()) == pytest.approx(0.01, abs=0.003)
    assert float((p_values <= 1e-3).double().mean()) < 2e-3


def pooled_runs(laws: Tensor, visits: int, runs: int, true_laws: Tensor) -> tuple[PooledProcess, Tensor]:
    """A process that has read `visits` tokens under each of laws [R, V], and cells [runs, cells] really drawn."""
    probs, _ = cell_probs(laws)
    process = PooledProcess()
    process.add_laws(probs, torch.full((len(laws),), float(visits), dtype=torch.float64))
    true_probs = torch.stack([_cells_of(true, laws[i]) for i, true in enumerate(true_laws)])
    rng = np.random.default_rng(2)
    drawn = sum(rng.multinomial(visits, (row / row.sum()).numpy(), runs) for row in true_probs)
    return process, torch.from_numpy(np.asarray(drawn)).double()


def _cells_of(true: Tensor, p: Tensor) -> Tensor:
    cells = torch.bucketize(torch.arange(len(p)), torch.tensor(evidence.CELL_RANKS), right=True)
    return torch.zeros(evidence.NUM_CELLS).double().index_add(0, cells, true[p.sort(descending=True).indices])


def test_pooled_bets_are_valid_and_find_a_bias() -> None:
    laws = torch.stack([law(100, seed, 2.0) for seed in range(40)])
    process, cells = pooled_runs(laws, 50, 20_000, laws)
    torch.testing.assert_close(process.expected, cells.mean(0), rtol=0.02, atol=0)
    e = process.log_e(cells).exp()
    assert float(e.mean()) == pytest.approx(1, abs=0.15)
    assert float((e >= 20).double().mean()) <= 0.05
    biased = torch.stack([0.85 * p + 0.15 * p**2 / (p**2).sum() for p in laws])
    process, cells = pooled_runs(laws, 400, 200, biased)
    assert float((process.log_e(cells) >= math.log(1e8)).double().mean()) > 0.9


def test_cells_have_the_probabilities_that_tokens_fall_into_them_with_ties_too() -> None:
    p = torch.tensor([[0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0, 0.0]]).double()
    probs, limits = cell_probs(p)
    for row in range(2):
        cells = (p[row][:, None] < limits[row]).sum(1)
        expected = torch.zeros(evidence.NUM_CELLS).double().index_add(0, cells, p[row])
        torch.testing.assert_close(probs[row], expected)
    wide = law(300, 3, 2.0)[None]
    probs, limits = cell_probs(wide)
    assert torch.bincount((wide[0][:, None] < limits[0]).sum(1)).tolist() == [1, 3, 12, 48, 236]


def test_the_smallest_detectable_shift_is_detected_and_half_of_it_is_not() -> None:
    p, visits, limit, p_limit = law(10, 4), 3000, math.log(1e8), 1e-8
    found = context_detectable(p, visits, limit, p_limit)
    for shift, to_top in ((found.from_top, False), (found.to_top, True)):
        assert shift is not None
        power = []
        for factor in (1.0, 0.5):
            q = shifted(p, factor * shift, to_top=to_top)
            assert float((q - p).abs().sum() / 2) == pytest.approx(factor * shift)
            counts = torch.from_numpy(np.random.default_rng(5).multinomial(visits, (q / q.sum()).numpy(), 1000))
            power.append(
                float(((log_e_of_context(p, counts) >= limit) | (g_test(p, counts)[0] <= p_limit)).double().mean())
            )
        assert power[0] > 0.975
        assert power[1] < 0.5
    assert context_detectable(p, 5, limit, p_limit).to_top is None, "5 samples show nothing at 1e-8"


def test_the_smallest_detectable_pooled_shift_is_detected() -> None:
    laws, limit = torch.stack([law(100, seed, 2.0) for seed in range(40)]), math.log(1e8)
    process, _ = pooled_runs(laws, 200, 1, laws)
    found = pooled_detectable(process, limit)
    assert found.from_top is not None
    share = found.from_top / float(laws.amax(1).mean())  # of each law's largest probability
    for factor, low, high in ((1.0, 0.975, 1.0), (0.5, 0.0, 0.5)):
        true = torch.stack([shifted(p, factor * share * float(p.max()), to_top=False) for p in laws])
        _, cells = pooled_runs(laws, 200, 1000, true)
        assert low <= float((process.log_e(cells) >= limit).double().mean()) <= high


# --- The certificate ---------------------------------------------------------------------------------------------


def run(small: Path, kernels: str = "auto", **changes: Any) -> Certificate:
    return certify(replace(OPTIONS, model=str(small), kernels=kernels, **changes))


def failed_parts(certificate: Certificate) -> set[str]:
    assert certificate.passed == (not certificate.failures)
    return {failure.part for failure in certificate.failures}


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_lossless_engine_passes(small: Path, few_comparisons: None, kernels: str) -> None:
    stages: dict[str, list[int]] = {}
    certificate = certify(
        replace(OPTIONS, model=str(small), kernels=kernels, dtype=EXACT_DTYPES[kernels]),
        lambda stage, *at: stages.setdefault(stage, at),
    )
    assert certificate.failures == []
    assert [r.rule for r in certificate.sampling.rules] == ["coupled", "block", "token"]
    assert len(stages) == 2 + 9, "loading and packing come first"
    assert list(stages)[:2] == ["loading weights", "packing weights"]
    assert all(total > 0 for _, total in stages.values())
    for r in certificate.sampling.rules:
        assert r.samples == sum(g.samples for g in r.groups) == r.together.samples == 320
        assert r.together.pooled_positions + r.rounded_contexts >= r.tokens * 0.99, "every token is pooled"
        assert r.iterations >= 3 * (r.samples - r.few_iterations)
        assert r.few_iterations < 0.05 * r.samples, "confident drafts alone"
        assert 1.5 < (r.mean_acceptance_length or 0) < 2.5
        assert 0 < r.repeated_contexts < r.contexts < r.tokens
        assert (r.together.pooled_shift.from_top or 1) < 0.1
    assert certificate.greedy.different == 0
    assert certificate.greedy.outputs == 5 * 2
    assert certificate.coupled is not None
    assert certificate.coupled.outputs == 8 * 2


Breaker = Callable[[pytest.MonkeyPatch], None]


def by_single_operations(patch: pytest.MonkeyPatch) -> None:
    """Verification by the rules in Python, where they can be broken."""
    patch.setattr(CpuKernels, "verify", speculation.verify)


def residual_is_p(patch: pytest.MonkeyPatch) -> None:
    by_single_operations(patch)
    right = rules._residuals

    def wrong(*args: Any) -> Residuals:
        laws = right(*args)
        return replace(laws, q_rows=[-1] * len(laws.q_rows), excluded=[-1] * len(laws.excluded))

    patch.setattr(rules, "_residuals", wrong)


def drafts_judged_at_another_temperature(patch: pytest.MonkeyPatch) -> None:
    by_single_operations(patch)
    right = rules._ratios

    def wrong(p: Tensor, q: Tensor | None, proposals: Any) -> list[list[float]]:
        return right(p, None if q is None else q**2 / (q**2).sum(-1, keepdim=True), proposals)

    patch.setattr(rules, "_ratios", wrong)


def bans_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = RequestEdits.current.fget
    assert right is not None

    def without(self: RequestEdits) -> LogitEdits | None:
        edits, nothing = right(self), array("q")
        return edits and replace(edits, end_ids=nothing, word_starts=array("q", [0]), word_tokens=nothing)

    patch.setattr(RequestEdits, "current", property(without))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (residual_is_p, "token"),
        (drafts_judged_at_another_temperature, "token"),
        (drafts_judged_at_another_temperature, "block"),
        (bans_are_forgotten, "block"),
    ],
)
def test_a_wrong_law_fails(
    small: Path, few_comparisons: None, monkeypatch: pytest.MonkeyPatch, broken: Breaker, rule: str
) -> None:
    broken(monkeypatch)
    certificate = run(small, rules=(rule,), samples=2000, num_prompts=1)
    assert "sampling" in failed_parts(certificate)
    assert certificate.coupled is None
    (result,) = certificate.sampling.rules
    if broken is bans_are_forgotten:
        assert result.impossible_tokens > 0
        assert result.worst.log10_e == math.inf
        failure = certificate.failures[0]
        assert "is impossible after output" in failure.message
        again = Engine.from_pretrained(small, kernels="auto")  # what is written down reproduces it
        (combination,) = (c for c in combinations_of(certificate) if c.name == "bad_words, min_tokens")
        params = replace(
            combination.params, seed=failure.reproduce["seed"], speculation=combination.speculation(rule, 2)
        )
        output = again.generate([certificate.prompts[0]], params)[0].token_ids
        wrong = failure.reproduce["output_token_ids"]
        assert output[: len(wrong)] == wrong
    else:
        assert result.worst.log10_e > certificate.sampling.log10_e_limit


def combinations_of(certificate: Certificate) -> list[Combination]:
    return make_plan(certificate.options).combinations


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS)
def test_drafts_emitted_in_place_of_choices_fail(
    small: Path, few_comparisons: None, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    by_single_operations(monkeypatch)
    monkeypatch.setattr(rules, "match_choices", lambda choices, drafts: [*drafts, choices[len(drafts)]])
    certificate = run(small, kernels, rules=("coupled",), samples=1200)
    assert failed_parts(certificate) == {"sampling", "greedy", "coupled"}
    comparison = certificate.greedy
    assert 0 < comparison.unexplained <= comparison.different
    assert comparison.largest_margin > equality.TIE
    example = comparison.examples[0]
    assert example.token != example.plain_token
    assert example.speculation["num_speculative_tokens"] in (1, 3)


def test_near_ties_are_rounding_where_rows_are_not_invariant(
    small: Path, few_comparisons: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_single_operations(monkeypatch)
    monkeypatch.setattr(rules, "match_choices", lambda choices, drafts: [*drafts, choices[len(drafts)]])
    monkeypatch.setattr(equality, "TIE", math.inf)
    plan = make_plan(replace(OPTIONS, model=str(small), kernels="reference"))
    cases = [c for c in equality.greedy_cases(plan) if c.name == "plain"]
    comparison, failures = equality.compare(plan, "greedy", cases, [SpeculationParams(3)], lambda *_: None)
    assert comparison.different > 0
    assert failures == []


# --- The command -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_prints_a_summary_or_json(small: Path, few_comparisons: None, tmp_path: Path) -> None:
    runner, file = CliRunner(), tmp_path / "certificate.json"
    arguments = ["eval", "lossless", "--model", str(small), "--samples", "120", "-k", "1", "--rules", "coupled,token"]
    result = runner.invoke(app, [*arguments, "--output", str(file), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == json.loads(file.read_text())
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert list(document) == [
        "schema", "passed", "options", "provenance", "combinations", "prompts", "sampling", "greedy", "coupled",
        "failures", "seconds",
    ]  # fmt: skip
    assert (document["schema"], document["passed"]) == (1, True)
    assert {"model", "kernels", "dtype", "torch", "specdec"} <= set(document["provenance"])
    assert [rule["rule"] for rule in document["sampling"]["rules"]] == ["coupled", "token"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0
    assert "lossless at alpha 1e-06: no test failed" in result.stdout


@pytest.mark.slow
def test_the_command_fails_where_the_engine_does(
    small: Path, few_comparisons: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bans_are_forgotten(monkeypatch)
    arguments = ["eval", "lossless", "--model", str(small), "--samples", "200", "-k", "1", "--rules", "block"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "c.json")])
    assert result.exit_code == 1
    assert "FAILED, sampling: block, bad_words, min_tokens: token" in result.stdout
    assert "NOT lossless" in result.stdout
    document = json.loads((tmp_path / "c.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    group = next(g for g in document["sampling"]["rules"][0]["groups"] if g["combination"] == "bad_words, min_tokens")
    assert group["log10_e_contexts"] is None, "infinite"


def test_impossible_options_and_checkpoints_are_refused(small: Path, tmp_path: Path) -> None:
    config = tiny_config(num_nextn_predict_layers=0)
    plain = write_checkpoint(tmp_path / "plain", config, with_mtp=False)
    for arguments, code, message in (
        (["--samples", "5"], 2, "samples = 5 must be from 100"),
        (["--alpha", "2"], 2, "alpha = 2.0 must be in (0, 1)"),
        (["--rules", "magic"], 2, "rules: 'magic' is unknown: choose among coupled, block, token"),
        (["--rules", ","], 2, "must name at least one rule"),
        (["--rules", "block,block"], 2, "none twice"),
        (["-k", "0"], 2, "num_speculative_tokens = 0 must be from 1 to 8"),
        (["--temperature", "0"], 2, "temperature = 0.0 must be from 1e-05"),
        (["--seed", "-1"], 2, "seed = -1 must be from 0"),
        (["--kernels", "magic"], 2, "kernels = 'magic' is unknown"),
        (["--output", str(tmp_path / "none" / "c.json")], 2, "there is no folder"),
        (["--model", str(tmp_path / "none")], 1, "none"),
        (["--model", str(plain)], 1, "has no MTP layer"),
        (["--kernels", "reference", "--dtype", "bfloat16"], 1, "choose dtype = 'float32'"),
    ):
        result = CliRunner().invoke(app, ["eval", "lossless", "--model", str(small), *arguments])
        assert result.exit_code == code, (arguments, result.output)
        assert message in result.stderr
        assert result.stderr.strip().count("\n") == 0
        assert result.stdout == ""


def test_the_small_checkpoint_is_the_same_for_the_same_seed(small: Path, tmp_path: Path) -> None:
    small_checkpoint_main([str(tmp_path / "again")])
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (small / name).read_bytes()
    with pytest.raises(SystemExit):
        small_checkpoint_main([str(tmp_path / "again")])


def test_make_certify_fits_its_checkpoint(small: Path) -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    (length,) = re.findall(r"--comparison-tokens (\d+)", makefile)
    make_plan(LosslessOptions(model=str(small), comparison_tokens=int(length)))
