"""Sampled decisions on the fake device: those of the composed path, token for token, for one wait per step.

Triton's kernels are interpreted, a thousand times slower than they are compiled, so the runs are short.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

pytest.importorskip("flashinfer", reason="FlashInfer is not installed: make test-flashinfer")

import triton

from specdec import Engine, GenerationOutput, SamplingParams, SpeculationParams
from specdec.errors import ModelError
from support import flashinfer_fakes
from support.flashinfer_fakes import FakeDevice

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton compiles in this process"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, for what no lane goes on to use
]

PROMPTS = ["class Stack:\n", "import os\n\ndef main():\n", "def test(self):\n    self.assertEqual("]


def asked(
    rule: str = "token", k: int = 2, *, num: int = 6, drafts: str = "sampled", least: float = 0.0, **law: Any
) -> SamplingParams:
    """least: min_draft_confidence."""
    return SamplingParams(
        max_tokens=num,
        speculation=SpeculationParams(k, rule, drafts, min_draft_confidence=least),
        **{"temperature": 0.8, "seed": 1, "ignore_eos": True} | law,
    )


CASES = {
    "token": [asked("token"), asked("token", 1, seed=2)],
    "block": [asked("block", 3), asked("block", 1, seed=2)],
    "coupled": [asked("coupled"), asked("coupled", 1, seed=2)],
    "greedy drafts": [asked("token", drafts="greedy"), asked("block", 3, drafts="greedy", seed=2)],
    "penalties": [asked("coupled", repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2)],
    "bias and bans": [
        asked("token", logit_bias={3: 5.0, 7: float("-inf")}, bad_words=(" ", (1, 2)), ignore_eos=False, min_tokens=3),
        asked("token", temperature=0, repetition_penalty=1.5),
    ],
    "cuts": [asked("token", 1, num=3, top_p=0.9, top_k=20, min_p=0.02)],
    "confidence": [asked("token", 3, least=0.4, num=12)],
    "greedy with confidence": [asked(k=3, temperature=0, least=0.7, num=12)],
}


class Run(NamedTuple):
    """decisions: all but the requests' names. waits: of each step."""

    outputs: list[GenerationOutput]
    decisions: list[tuple[Any, ...]]
    waits: list[list[str]]


def run(fake: FakeDevice, engine: Engine, params: list[SamplingParams]) -> Run:
    waits, step = [], engine.core.step

    def counting() -> Any:
        with fake.waiting() as found:
            done = step()
        waits.append(found)
        return done

    engine.core.step = counting  # type: ignore[method-assign]
    with engine.core.traced() as trace:
        outputs = engine.generate([PROMPTS[b % len(PROMPTS)] for b in range(len(params))], params)
    engine.core.step = step  # type: ignore[method-assign]
    return Run(outputs, [decision[1:] for decision in trace], waits)


def on_device_and_on_host(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, params: list[SamplingParams], **config: Any
) -> tuple[Run, Run]:
    engine = flashinfer_fakes.engine(monkeypatch, "bundled", prefix_caching=False, **config)
    ours = run(fake, engine, params)
    flashinfer_fakes.decide_on_the_host(monkeypatch)
    return ours, run(fake, engine, params)


def counts(run: Run) -> list[dict[tuple[int, int], int]]:
    """How many drafts were verified and accepted, of each request."""
    return [output.stats.outcomes for output in run.outputs]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return flashinfer_fakes.install(monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_a_step_decides_as_on_the_host_and_waits_once(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    ours, composed = on_device_and_on_host(fake, monkeypatch, CASES[case], cuda_graphs=False)
    assert ours.decisions == composed.decisions
    assert counts(ours) == counts(composed)
    assert ours.waits == [["tolist in decide"]] * len(ours.waits)
    assert any(draft_ids for _, draft_ids, _ in ours.decisions)
    if "confidence" in case:
        assert len({len(draft_ids) for _, draft_ids, _ in ours.decisions[1:-1]}) > 1, "no chain was ended"


def test_all_rules_at_once_with_graphs_and_too_few_pages(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [
        asked(k=2, temperature=0), asked("coupled", 1, seed=2), asked("token", seed=3),
        asked("block", seed=4, presence_penalty=0.3), asked("token", 0, num=2, seed=5),
    ]  # fmt: skip
    config = {"max_num_seqs": 4, "max_num_batched_tokens": 40, "page_size": 4, "num_pages": 10}
    ours, composed = on_device_and_on_host(fake, monkeypatch, params, speculation=SpeculationParams(2), **config)
    assert ours.decisions == composed.decisions
    assert counts(ours) == counts(composed)
    assert sum(output.stats.num_preemptions for output in ours.outputs) > 0
    assert all(waits in ([], ["tolist in decide"]) for waits in ours.waits)  # []: parts of prompts


def test_log_probabilities_are_read_at_once_after_the_tokens(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [
        asked("coupled", logprobs=2, presence_penalty=0.3),
        asked("token", 1, seed=2),
        asked("token", 1, num=2, seed=3, logprobs=0),
    ]
    ours, composed = on_device_and_on_host(fake, monkeypatch, params, cuda_graphs=False)
    assert ours.decisions == composed.decisions
    assert [o.logprobs for o in ours.outputs] == [o.logprobs for o in composed.outputs]
    assert ours.outputs[0].logprobs
    assert {tuple(waits) for waits in ours.waits} == {("tolist in decide", "tolist in token_logprobs")}


@pytest.mark.parametrize("broken", ["mtp", "target"])
def test_logits_that_are_not_finite_are_an_error(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    engine = flashinfer_fakes.engine(monkeypatch, "bundled", cuda_graphs=False)
    with pytest.raises(ModelError, match=flashinfer_fakes.break_norm(engine, broken)):
        engine.generate(PROMPTS[0], asked())
