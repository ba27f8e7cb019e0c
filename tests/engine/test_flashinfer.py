"""The engine on FlashInfer's kernels (over fakes of what it compiles), against the reference kernels in float64.

What either computes is the same on every CPU, so how many near-ties fall otherwise is, too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("flashinfer", reason="FlashInfer is not installed: make test-flashinfer")

import triton

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.cost import CostTable
from specdec.errors import ModelError
from specdec.eval.prompts.sets import load_stdlib
from specdec.kernels.flashinfer.experts import FusedExperts, GroupedExperts
from support import flashinfer_fakes
from support.fakes import tiny_config, write_checkpoint
from support.flashinfer_fakes import FakeDevice
from support.near_ties import Forced, acceptance, num_differing, relative_error, teacher_forced

# Small pages, and too few: prompts in chunks, pages that are crossed in every step, preemption.
TIGHT = {"max_num_seqs": 3, "max_num_batched_tokens": 27, "page_size": 4, "num_pages": 44}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return flashinfer_fakes.install(monkeypatch)


@pytest.fixture(scope="module")
def exact() -> Engine:
    """The bundled checkpoint's bf16 weights, in float64."""
    return Engine.from_pretrained("bundled", kernels="reference", dtype="float64")


@pytest.fixture(scope="module")
def prompts(exact: Engine) -> list[list[int]]:
    texts = ["x = ", *(p.prompt for p in load_stdlib()[:5])]
    return [exact.checkpoint.encode(text)[:n] for text, n in zip(texts, (40, 40, 90, 17, 61, 28))]


def greedy(k: int) -> SamplingParams:
    return SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, speculation=SpeculationParams(k))


MIXED = [greedy(k) for k in (3, 1, 0, 5, 2, 3)]


@pytest.mark.parametrize("experts", [FusedExperts(), GroupedExperts()], ids=["fused", "grouped"])
def test_hidden_states_are_as_exact_as_the_references_in_bf16(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, exact: Engine, experts: FusedExperts | GroupedExperts
) -> None:
    token_ids = exact.checkpoint.encode(load_stdlib()[7].prompt)[:200]
    ours = teacher_forced(flashinfer_fakes.engine(monkeypatch, "bundled", experts, cuda_graphs=False), token_ids)
    plain = Engine.from_pretrained("bundled", kernels="reference", dtype="bfloat16")
    truth, reference = teacher_forced(exact, token_ids), teacher_forced(plain, token_ids)

    def errors(of: Forced) -> Tensor:
        """Of the rows for which rounding did not turn the routers: another expert is another function. Some of them see
        rows for which it did, so nine of ten are held to the bound."""
        same = (of.expert_ids.sort(-1).values == truth.expert_ids.sort(-1).values).all(-1).all(0)
        assert same.double().mean() > 0.8
        return ((of.hidden.double() - truth.hidden).norm(dim=-1) / truth.hidden.norm(dim=-1))[same]

    assert errors(ours).quantile(0.9) <= relative_error(12)
    assert errors(ours).median() <= 1.1 * errors(reference).median()


@pytest.mark.parametrize(
    ("cuda_graphs", "experts"),
    [(False, FusedExperts()), (True, FusedExperts()), (True, GroupedExperts())],
    ids=["eager", "graphs", "graphs-grouped"],
)
def test_greedy_outputs_are_the_references_up_to_near_ties(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, exact: Engine, prompts: list[list[int]],
    cuda_graphs: bool, experts: FusedExperts | GroupedExperts,
) -> None:  # fmt: skip
    engine = flashinfer_fakes.engine(monkeypatch, "bundled", experts, cuda_graphs=cuda_graphs, **TIGHT)
    ours, theirs = engine.generate(prompts, MIXED), exact.generate(prompts, MIXED)
    assert num_differing(exact, ours, theirs) <= 3  # of six; that it tells near-ties apart is in test_near_ties
    assert sum(o.stats.num_preemptions for o in ours) > 0
    pairs = list(zip(ours, theirs))
    agreeing = [a for a, b in pairs if a.token_ids == b.token_ids]
    assert acceptance(agreeing) > 0.5
    assert abs(acceptance(agreeing) - acceptance([b for a, b in pairs if a.token_ids == b.token_ids])) < 0.1
    engine.core.scheduler.check_integrity()
    assert engine.core.scheduler.pool.num_pages == 44  # the scratch page is nobody's


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
def test_a_step_waits_for_the_device_once_and_only_where_tokens_are_decided(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], cuda_graphs: bool
) -> None:
    engine = flashinfer_fakes.engine(monkeypatch, "bundled", cuda_graphs=cuda_graphs, **TIGHT)
    waits_of_steps = []
    step = engine.core.step

    def counting() -> object:
        with engine.core.traced() as decisions, fake.waiting() as waits:
            done = step()
        waits_of_steps.append(waits)
        assert len(waits) == bool(decisions), waits
        return done

    monkeypatch.setattr(engine.core, "step", counting)
    engine.generate(prompts, [greedy(k) for k in (3, 1, 0, 3, 2, 3)])
    assert {wait for waits in waits_of_steps for wait in waits} == {"tolist in decide"}
    assert [] in waits_of_steps


def test_more_drafts_than_were_captured_wait_for_a_plan_and_change_nothing(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, exact: Engine, prompts: list[list[int]]
) -> None:
    engine = flashinfer_fakes.engine(monkeypatch, "bundled", speculation=SpeculationParams(2), **TIGHT)
    with fake.waiting() as waits:
        ours = engine.generate(prompts, greedy(6))
    assert set(waits) == {"tolist in decide", "an event in plan"}
    assert num_differing(exact, ours, exact.generate(prompts, greedy(6))) <= 3


def test_drafts_on_the_device_are_those_on_the_host(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]
) -> None:
    """Of the same kernels, so to the last token."""
    traces = []
    for _ in range(2):
        engine = flashinfer_fakes.engine(monkeypatch, "bundled", cuda_graphs=False, **TIGHT)
        with engine.core.traced() as trace:
            engine.generate(prompts, MIXED)
        traces.append([decision[1:] for decision in trace])  # without the requests' names
        flashinfer_fakes.decide_on_the_host(monkeypatch)
    assert traces[0] == traces[1]
    assert any(any(draft_token_ids) for _, draft_token_ids, _ in traces[0])


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton compiles in this process")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, for what no lane goes on to use
def test_log_probabilities_are_those_of_drafts_that_were_on_the_device(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]
) -> None:
    engine = flashinfer_fakes.engine(monkeypatch, "bundled", cuda_graphs=False, prefix_caching=False)
    params = replace(greedy(3), max_tokens=8)
    plain = engine.generate(prompts[:2], params)
    asked = engine.generate(prompts[:2], replace(params, logprobs=2))
    assert [o.token_ids for o in asked] == [o.token_ids for o in plain]
    assert sum(o.stats.num_accepted_tokens for o in asked) > 0
    for output in asked:
        assert output.logprobs is not None
        assert [x.top[0][0] for x in output.logprobs] == output.token_ids


@pytest.mark.parametrize("broken", ["mtp", "target"])
def test_logits_that_are_not_finite_are_an_error(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], broken: str
) -> None:
    engine = flashinfer_fakes.engine(monkeypatch, "bundled", **TIGHT)
    with pytest.raises(ModelError, match=flashinfer_fakes.break_norm(engine, broken)):
        engine.generate(prompts[:1], greedy(3))


GLM = {"num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151552, "hidden_size": 64,
       "moe_intermediate_size": 16, "num_experts_per_tok": 8, "torch_dtype": "bfloat16"}  # fmt: skip
SHAPES = {
    "GLM-4.5-Air": {"n_routed_experts": 128, "use_qk_norm": False, "num_hidden_layers": 2},
    "GLM-4.5": {"n_routed_experts": 160, "use_qk_norm": True, "routed_scaling_factor": 2.5, "num_hidden_layers": 4,
                "first_k_dense_replace": 3},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shapes_of_glm_at_reduced_width_and_depth(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shape: str
) -> None:
    checkpoint = write_checkpoint(tmp_path, tiny_config(**GLM, **SHAPES[shape]), dtype=torch.bfloat16)
    exact = Engine.from_pretrained(checkpoint, kernels="reference", dtype="float64", num_pages=8)
    engine = flashinfer_fakes.engine(monkeypatch, checkpoint, max_num_seqs=2, num_pages=16)
    token_ids = list(range(3, 60))
    ours, truth = teacher_forced(engine, token_ids), teacher_forced(exact, token_ids)
    same = (ours.expert_ids.sort(-1).values == truth.expert_ids.sort(-1).values).all(-1).all(0)
    errors = (ours.hidden.double() - truth.hidden).norm(dim=-1) / truth.hidden.norm(dim=-1)
    assert errors[same].quantile(0.9) <= relative_error(SHAPES[shape]["num_hidden_layers"])
    assert same.double().mean() > 0.3  # 8 of 128 or 160 random experts have many near-ties
    with fake.waiting() as waits:
        outputs = engine.generate([token_ids[:20], token_ids[:3]], greedy(3))
    assert [len(o.token_ids) for o in outputs] == [24, 24]
    assert set(waits) == {"tolist in decide"}


def test_draft_length_auto_has_graphs_of_several_lengths_and_pairs_that_wait(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, exact: Engine, prompts: list[list[int]]
) -> None:
    costs = CostTable({1: 1.0, 40: 1.2}, {1: 0.1, 40: 0.1}, {1: 0.05})
    speculation = SpeculationParams("auto")
    engine = flashinfer_fakes.engine(monkeypatch, "bundled", speculation=speculation, cost_table=costs, **TIGHT)
    auto = replace(greedy(0), speculation=speculation)
    ours, theirs = engine.generate(prompts, auto), exact.generate(prompts, greedy(3))
    assert num_differing(exact, ours, theirs) <= 3
    chosen = engine.stats().draft_length.chosen
    assert sum(count > 0 for count in chosen) >= 3, chosen
    lengths = {query_len - 1 for query_len, _ in engine.runtime.model.target.decoder.prepared.graphs._by_shape}
    assert lengths == {0, 1, 2, 3, 5, 8}
