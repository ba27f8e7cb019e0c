"""The engine on a GPU: tokens up to near-ties, acceptance, graphs against eager forwards, one wait per step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.eval.prompts.sets import load_stdlib
from support.near_ties import acceptance, num_differing, relative_error, teacher_forced

PARAMS = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
NUM_PROMPTS = 24
CONFIG = {"max_num_seqs": 8, "max_num_batched_tokens": 96, "page_size": 16}


@pytest.fixture(scope="module")
def exact() -> Engine:
    return Engine.from_pretrained("bundled", device="cpu", kernels="reference", dtype="float32")


@pytest.fixture(scope="module")
def on_cpu() -> Engine:
    return Engine.from_pretrained("bundled", device="cpu", dtype="bfloat16", **CONFIG)


@pytest.fixture(scope="module", params=[False, True], ids=["eager", "graphs"])
def on_gpu(request: pytest.FixtureRequest) -> Engine:
    return Engine.from_pretrained("bundled", device="cuda", kernels="flashinfer", cuda_graphs=request.param, **CONFIG)


@pytest.fixture(scope="module")
def prompts(exact: Engine) -> list[list[int]]:
    return [exact.checkpoint.encode(p.prompt)[: 10 + 9 * i] for i, p in enumerate(load_stdlib()[:NUM_PROMPTS])]


def test_auto_is_the_gpu() -> None:
    kernels = Engine.from_pretrained("bundled", max_num_seqs=1, cuda_graphs=False).runtime.model.target.kernels
    assert (kernels.name, kernels.device.type) == ("flashinfer", "cuda")


def test_hidden_states(exact: Engine, on_gpu: Engine, prompts: list[list[int]]) -> None:
    ours, truth = teacher_forced(on_gpu, prompts[-1]), teacher_forced(exact, prompts[-1])
    same = (ours.expert_ids.sort(-1).values == truth.expert_ids.sort(-1).values).all(-1).all(0)
    errors = (ours.hidden.float() - truth.hidden).norm(dim=-1) / truth.hidden.norm(dim=-1)
    assert same.double().mean() > 0.8
    assert errors[same].quantile(0.9) <= relative_error(12)


def test_greedy_tokens_and_acceptance_are_the_cpus_up_to_near_ties(
    exact: Engine, on_cpu: Engine, on_gpu: Engine, prompts: list[list[int]]
) -> None:
    ours, theirs = on_gpu.generate(prompts, PARAMS), on_cpu.generate(prompts, PARAMS)
    assert num_differing(exact, ours, theirs) <= NUM_PROMPTS // 3
    agreeing = [(a, b) for a, b in zip(ours, theirs) if a.token_ids == b.token_ids]
    assert abs(acceptance([a for a, _ in agreeing]) - acceptance([b for _, b in agreeing])) < 0.05


def test_plain_decoding_gives_the_same_tokens_up_to_near_ties(
    exact: Engine, on_gpu: Engine, prompts: list[list[int]]
) -> None:
    """Verification has rows of another shape, so products are summed in another order."""
    plain = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True, speculation=SpeculationParams(0))
    assert num_differing(exact, on_gpu.generate(prompts, PARAMS), on_gpu.generate(prompts, plain)) <= NUM_PROMPTS // 3


@pytest.mark.parametrize("rule", ["coupled", "token", "block"])
def test_sampled_requests_run_and_their_drafts_are_accepted(
    on_cpu: Engine, on_gpu: Engine, prompts: list[list[int]], rule: Any
) -> None:
    params = [
        SamplingParams(max_tokens=48, temperature=0.7, seed=i, ignore_eos=True, speculation=SpeculationParams(3, rule))
        for i in range(NUM_PROMPTS)
    ]
    ours, theirs = on_gpu.generate(prompts, params), on_cpu.generate(prompts, params)
    assert abs(acceptance(ours) - acceptance(theirs)) < 0.1


@pytest.fixture
def sync_warnings() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("warn")
    yield
    torch.cuda.set_sync_debug_mode("default")


SAMPLED = [
    replace(
        PARAMS, temperature=0.8, seed=1, top_p=top_p, repetition_penalty=penalty, speculation=SpeculationParams(3, rule)
    )
    for rule, top_p, penalty in (("coupled", 1.0, 1.0), ("token", 0.9, 1.0), ("block", 1.0, 1.2), ("token", 1.0, 1.0))
]


@pytest.mark.parametrize("params", [[PARAMS] * 4, SAMPLED], ids=["greedy", "sampled"])
def test_a_decode_step_waits_for_the_device_once(
    on_gpu: Engine,
    prompts: list[list[int]],
    params: list[SamplingParams],
    sync_warnings: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpu.generate(prompts[:4], params)  # whatever is compiled or allocated at first
    step = on_gpu.core.step

    def counting() -> object:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            done = step()
        waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
        assert len(waits) <= 1, waits
        return done

    monkeypatch.setattr(on_gpu.core, "step", counting)
    on_gpu.generate(prompts[:4], params)


def test_replays_survive_preemption_and_pages_that_move(
    exact: Engine, on_cpu: Engine, prompts: list[list[int]]
) -> None:
    tight = Engine.from_pretrained("bundled", device="cuda", max_num_seqs=4, page_size=4, num_pages=100)
    ours = tight.generate(prompts[:12], PARAMS)
    assert sum(o.stats.num_preemptions for o in ours) > 0
    assert num_differing(exact, ours, on_cpu.generate(prompts[:12], PARAMS)) <= 4
    tight.core.scheduler.check_integrity()
