"""GLM-4.5 and GLM-4.5-Air in their full width, two layers and the MTP layer, on FlashInfer's kernels (over fakes)."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

pytest.importorskip("flashinfer", reason="FlashInfer is not installed: make test-flashinfer")

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.kernels.flashinfer.experts import FusedExperts, GroupedExperts
from support import flashinfer_fakes, repeated_weights
from support.fakes import tiny_config
from support.flashinfer_fakes import FakeDevice
from support.near_ties import relative_error, teacher_forced

NUM_LAYERS = 2
BOTH = {
    "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151552, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "num_hidden_layers": NUM_LAYERS, "torch_dtype": "bfloat16",
}  # fmt: skip
MODELS = {
    "GLM-4.5-Air": {
        "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 128,
        "use_qk_norm": False,
    },
    "GLM-4.5": {
        "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160,
        "use_qk_norm": True, "routed_scaling_factor": 2.5,
    },
}  # fmt: skip
PROMPT = list(range(3, 151552, 9001))


class InPlace(FusedExperts):
    """Gate rows taken for up rows: what is to be seen here are shapes, and the swap would copy gigabytes."""

    def pack_gate_up(self, weight: Tensor) -> Tensor:
        return weight


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    repeated_weights.install(monkeypatch)
    return flashinfer_fakes.install(monkeypatch)


def check_generation(fake: FakeDevice, engine: Engine) -> None:
    """Through CUDA graphs, in steps that wait once."""
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, speculation=SpeculationParams(3))
    with fake.waiting() as waits:
        outputs = engine.generate([PROMPT, PROMPT[:3]], params)
    assert [len(o.token_ids) for o in outputs] == [6, 6]
    assert all(o.stats.num_draft_tokens > 0 for o in outputs)
    assert set(waits) == {"tolist in decide"}


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_the_references(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Both round to bf16, each on its own; some rows see others whose routing turned, so nine of ten are held to it."""
    checkpoint = repeated_weights.write_checkpoint(tmp_path, tiny_config(**BOTH, **MODELS[name]))
    reference = Engine.from_pretrained(checkpoint, kernels="reference", dtype="bfloat16", num_pages=8)
    engine = flashinfer_fakes.engine(monkeypatch, checkpoint, GroupedExperts(), max_num_seqs=2, num_pages=16)
    ours, theirs = teacher_forced(engine, PROMPT), teacher_forced(reference, PROMPT)
    assert ours.logits.shape == (len(PROMPT), 151552)
    assert ours.expert_ids.unique().numel() > 20
    same = (ours.expert_ids.sort(-1).values == theirs.expert_ids.sort(-1).values).all(-1).all(0)
    assert same.double().mean() > 0.7
    errors = (ours.hidden.float() - theirs.hidden.float()).norm(dim=-1) / theirs.hidden.float().norm(dim=-1)
    assert errors[same].quantile(0.9) <= 2**0.5 * relative_error(NUM_LAYERS)
    check_generation(fake, engine)


@pytest.mark.parametrize("name", MODELS)
def test_fused_experts_take_these_shapes(
    fake: FakeDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    checkpoint = repeated_weights.write_checkpoint(tmp_path, tiny_config(**BOTH, **MODELS[name]))
    check_generation(fake, flashinfer_fakes.engine(monkeypatch, checkpoint, InPlace(), max_num_seqs=2, num_pages=16))
