"""What an engine's trace tells: every decision, with its drafts, from where it began."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec import Engine, SamplingParams, SpeculationParams
from support.fakes import KERNELS, write_planted_checkpoint


@pytest.mark.parametrize("kernels", KERNELS)
def test_decisions_make_up_the_outputs_and_the_counts(tmp_path: Path, kernels: str) -> None:
    engine = Engine.from_pretrained(
        write_planted_checkpoint(tmp_path), kernels=kernels, max_num_seqs=2, max_num_batched_tokens=18
    )
    prompts = [list(range(3, 3 + n)) for n in (1, 40, 7, 25)]
    speculations = [SpeculationParams(k) for k in (3, 2, 0, 4)]
    params = [SamplingParams(max_tokens=20, temperature=0.7, seed=i, speculation=s) for i, s in enumerate(speculations)]
    with engine.core.traced() as trace:
        outputs = engine.generate(prompts, params)
    for output, speculation in zip(outputs, speculations):
        made = [v for v in trace if v.request_id == output.request_id]
        tokens, stats = output.prompt_token_ids + output.token_ids, output.stats
        position = len(output.prompt_token_ids)
        for v in made:
            assert v.start == position
            emitted = v.output_token_ids
            assert emitted[:-1] == v.draft_token_ids[: len(emitted) - 1]
            assert tokens[v.start : v.start + len(emitted)] == emitted[: len(tokens) - v.start]
            position += len(emitted)
        assert position >= len(tokens)
        assert len(made) == stats.num_target_forwards
        assert sum(len(v.draft_token_ids) for v in made) == stats.num_draft_tokens
        assert sum(len(v.output_token_ids) - 1 for v in made) == stats.num_accepted_tokens
        assert (stats.num_draft_tokens > 0) == (speculation.num_speculative_tokens > 0)
    assert sum(o.stats.num_accepted_tokens for o in outputs) > 0


def test_nothing_is_told_outside(tmp_path: Path) -> None:
    engine = Engine.from_pretrained(write_planted_checkpoint(tmp_path), kernels="reference")
    params = SamplingParams(max_tokens=4, temperature=0)
    with engine.core.traced() as first:
        engine.generate(["a"], params)
    told = len(first)
    engine.generate(["b"], params)
    assert len(first) == told > 0
    with engine.core.traced() as second:
        engine.generate(["c"], params)
    assert {v.request_id for v in second}.isdisjoint(v.request_id for v in first)
