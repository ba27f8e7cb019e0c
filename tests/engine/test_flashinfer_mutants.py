"""Mistakes that must not go unseen: each is made in the production code, and then a short run of the engine must fail,
or leave other tokens, acceptance or cache."""

from __future__ import annotations

import functools
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("flashinfer", reason="FlashInfer is not installed: make test-flashinfer")

import triton

from specdec import ModelError, SamplingParams, SpeculationParams
from specdec.kernels.flashinfer import argmax, backend, chain, drafts, experts, graphs, pages, planner, sampled
from specdec.kernels.triton import layout
from specdec.step import verify
from support import flashinfer_fakes
from support.flashinfer_fakes import FakeDevice

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, for what no lane goes on to use
PROMPTS = ["class Stack:\n", "import os\n\ndef main():\n", "def test(self):\n    self.assertEqual("]
PARAMS = [
    SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, speculation=SpeculationParams(3)) for n in (11, 18, 24)
]
# Every rule, edits, chains of different lengths and some that end early; short, as Triton is interpreted.
SAMPLED = [
    SamplingParams(
        max_tokens=5,
        seed=number,
        repetition_penalty=1.2,
        speculation=SpeculationParams(k, rule, min_draft_confidence=least),
    )
    for number, (k, rule, least) in enumerate([(1, "coupled", 0.0), (2, "token", 0.0), (2, "block", 0.4)])
]
# As many pages as the three need, so that the last one is in use.
CONFIG = {"max_num_seqs": 3, "page_size": 4, "num_pages": 13}


@dataclass(frozen=True)
class Outcome:
    """kv_cache: as the run leaves it, without the scratch page."""

    token_ids: list[list[int]]
    outcomes: list[dict[tuple[int, int], int]]
    kv_cache: Tensor

    def assert_equal(self, other: Outcome) -> None:
        assert self.token_ids == other.token_ids
        assert self.outcomes == other.outcomes
        assert torch.equal(self.kv_cache, other.kv_cache)


def run(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, *, cuda_graphs: bool, sampled: bool) -> Outcome:
    """Fails where the fakes object, or where a step waits more than once."""
    engine = flashinfer_fakes.engine(monkeypatch, "bundled", cuda_graphs=cuda_graphs, **CONFIG)
    num_steps, step = 0, engine.core.step

    def counting() -> object:
        nonlocal num_steps
        num_steps += 1
        return step()

    monkeypatch.setattr(engine.core, "step", counting)
    with fake.waiting() as waits:
        outputs = engine.generate(PROMPTS, SAMPLED if sampled else PARAMS)
    assert len(waits) <= num_steps
    kv_cache = engine.runtime.kv_cache[:, : CONFIG["num_pages"]].as_subclass(Tensor)
    return Outcome([o.token_ids for o in outputs], [o.stats.outcomes for o in outputs], kv_cache)


@pytest.fixture(scope="module")
def expected() -> Callable[..., Outcome]:
    """Of a run without a mistake; that this is right is for other tests."""

    @functools.cache
    def outcome(**how: bool) -> Outcome:
        with pytest.MonkeyPatch.context() as monkeypatch:
            return run(flashinfer_fakes.install(monkeypatch), monkeypatch, **how)

    return outcome


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the source of `function`. It shows where graphs are replayed, or where tokens are
    sampled."""

    function: Callable[..., Any]
    old: str
    new: str
    graphs: bool = False
    sampled: bool = False


MUTANTS = {
    "stale indptr": Mutant(
        graphs.CapturedForward._prepare, "pinned(pages.indptr)", "pinned(self._planned or pages.indptr)", graphs=True
    ),
    "stale positions and slots": Mutant(
        graphs.CapturedForward._prepare,
        "self._numbers[: len(numbers)].copy_(numbers, non_blocking=True)",
        "pass",
        graphs=True,
    ),
    "page crossing without a plan": Mutant(
        graphs.CapturedForward._prepare, "if pages.indptr != self._planned:", "if not self._planned:", graphs=True
    ),
    "swapped gate and up": Mutant(experts.FusedExperts.pack_gate_up, "[up, gate]", "[gate, up]"),
    "float16 default dtype": Mutant(planner.Wrapper.plan, "q_data_type=shape.dtype, kv_data_type=shape.dtype, ", ""),
    "float16 queries": Mutant(planner.Wrapper.plan, "q_data_type=shape.dtype, kv_data", "kv_data"),
    "backend left to FlashInfer": Mutant(planner.Planner._make_prefill, ', backend="fa2"', ', backend="fa3"'),
    "no tensor cores": Mutant(planner.Planner._make_decode, "use_tensor_cores=True, ", ""),
    "not causal": Mutant(planner.Planner.plan, "causal=True", "causal=False"),
    "missing scratch page": Mutant(graphs.CapturedForward._prepare, "shape[1] - 1", "shape[1] - 2", graphs=True),
    "padding on a live page": Mutant(
        pages.FixedBatch.fill, "[scratch_page * size + i % size", "[i % size", graphs=True
    ),
    "padding sequences without rows": Mutant(
        pages.FixedBatch.fill, "kv_lens += [query_len] * num_padding", "kv_lens += [1] * num_padding", graphs=True
    ),
    "plan before the last one was copied": Mutant(planner.Planner._next, "< NUM_IN_TURN", "< 1"),
    "drafts read at once": Mutant(
        chain.device_chain,
        "Drafts(zeros, draws.prob_rows, draws.probs, draws.ids.clone(), list(range(len(counts))))",
        "Drafts([row[:n] for row, n in zip(draws.ids.tolist(), counts)], draws.prob_rows, draws.probs)",
    ),
    "drafts not placed": Mutant(drafts.place_, "if places:", "if False:"),
    "drafts one row late": Mutant(drafts.place_, "first + 1 + i", "min(first + 2 + i, len(tokens) - 1)"),
    "previous states not copied": Mutant(
        graphs.CapturedForward.run, "self._inputs.previous.index_copy_(0, rows, previous)", "pass", graphs=True
    ),
    "tokens not copied": Mutant(
        graphs.CapturedForward.run, "self._inputs.tokens.index_copy_(0, rows, tokens)", "pass", graphs=True
    ),
    "outputs handed out without a copy": Mutant(
        graphs.CapturedForward.run,
        "*(x.index_select(0, rows) for x in self._output)",
        "*(x[: len(rows)] for x in self._output)",
        graphs=True,
    ),
    "the wrong row goes on": Mutant(chain.device_chain, "ends[b] - 1", "max(ends[b] - 2, 0)"),
    "drafts at the position before": Mutant(
        chain.device_chain, "one_more_row(metadata, active, step)", "one_more_row(metadata, active, step - 1)"
    ),
    "drafts of other sequences": Mutant(argmax.ArgmaxDraws.draw, "upload(active,", "upload(list(range(len(active))),"),
    "a sum in no fixed order": Mutant(
        experts.FusedExperts.__call__, "use_fused_finalize=False", "use_fused_finalize=True"
    ),
    "a second wait": Mutant(
        sampled.decide, "raw = logits.clone()", "given.tolist(); raw = logits.clone()", sampled=True
    ),
    "a wait in a chain": Mutant(
        sampled.SampledDraws.draw, "if len(active)", "if self.ids[0, 0] != 0 and len(active)", sampled=True
    ),
    "stale batch": Mutant(
        layout.Batch._fill,
        "(POSITION, rows.positions)",
        '(POSITION, vars(self).setdefault("before", rows.positions))',
        sampled=True,
    ),
    "laws of another row": Mutant(
        sampled.decide,
        "batch.drafts.probs)",
        "None if batch.drafts.probs is None else batch.drafts.probs.flip(0))",
        sampled=True,
    ),
    "logits of another sequence": Mutant(sampled.SampledDraws.draw, "places.get(b, 0)", "0", sampled=True),
    "uncapped counts": Mutant(
        verify.TargetVerifier.verify,
        "s.num_new_tokens + len(row)",
        "s.num_new_tokens + s.num_draft_tokens",
        sampled=True,
    ),
    "drafts up to their count": Mutant(drafts.up_to_end, "NOT_DRAFTED in ids", "False", sampled=True),
    "another sequence's drafts": Mutant(
        drafts.in_order, "last if row < 0 else row for row in rows", "(row + 1) % last for row in rows", sampled=True
    ),
    "lengths from the device": Mutant(
        planner.Planner.plan, "pinned(pages.last_page_len)", "upload(pages.last_page_len, self.device)"
    ),
}


def mutate(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    function = mutant.function
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutant.old) == 1, "the production code has changed: the mutant must, too"
    module = sys.modules[function.__module__]
    namespace = dict(vars(module))
    exec(f"from __future__ import annotations\n{source.replace(mutant.old, mutant.new)}", namespace)
    changed = namespace[function.__name__]
    owner, _, name = function.__qualname__.rpartition(".")
    monkeypatch.setattr(getattr(module, owner) if owner else module, name, changed)
    if not owner and name in vars(backend):  # which imports it by name
        monkeypatch.setattr(backend, name, changed)


@pytest.mark.parametrize("name", MUTANTS)
def test_it_is_seen(monkeypatch: pytest.MonkeyPatch, expected: Callable[..., Outcome], name: str) -> None:
    mutant = MUTANTS[name]
    if mutant.sampled and not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles in this process")
    how = {"cuda_graphs": mutant.graphs, "sampled": mutant.sampled}
    sound, fake = expected(**how), flashinfer_fakes.install(monkeypatch)
    mutate(monkeypatch, mutant)
    # A row that no draft wrote holds what memory held; where that is NaN, the mutant ends in the engine's own error.
    with pytest.raises((AssertionError, ValueError, ModelError)):
        run(fake, monkeypatch, **how).assert_equal(sound)
