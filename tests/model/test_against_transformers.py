"""Target and MTP logits against transformers' Glm4MoeForCausalLM, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.cache.pages import allocate_kv_cache
from specdec.kernels import select
from specdec.model.weights import CheckpointIndex, LoadedModel, load_model
from specdec.step.batch import Extend, build_batch
from support import fp8_checkpoints
from support.fakes import KERNELS, random_tensors, tiny_config, write_checkpoint, write_files

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
PAGE_SIZE = 4

# Every switch of the architecture, each value at least twice.
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"attention_bias": False},
    "no-qk-norm": {"use_qk_norm": False},
    "air-like": {"attention_bias": True, "use_qk_norm": False, "num_attention_heads": 12, "num_key_value_heads": 1},
    "groups": {"n_group": 4, "topk_group": 2},
    "groups-unnormed": {"n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "all-dense": {"first_k_dense_replace": 2, "use_qk_norm": False},
    "no-dense": {"first_k_dense_replace": 0, "routed_scaling_factor": 2.5},
    "tied": {"tie_word_embeddings": True, "attention_bias": False},
    "full-rotary": {"partial_rotary_factor": 1.0, "rope_theta": 1e6},
    "narrow-rotary": {"partial_rotary_factor": 0.25, "num_key_value_heads": 4},
    "two-shared": {"n_shared_experts": 2, "num_experts_per_tok": 3},
    "odd-sizes": {
        "hidden_size": 40,
        "head_dim": 24,
        "moe_intermediate_size": 20,
        "vocab_size": 173,
        "n_routed_experts": 6,
    },
    "all-experts": {"num_experts_per_tok": 8, "norm_topk_prob": False},
    "four-layers": {"num_hidden_layers": 4, "first_k_dense_replace": 1, "rms_norm_eps": 1e-3},
}


def forward(model: LoadedModel, token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """One prefill -> the target's hidden states [T, H] and the KV cache."""
    num_pages = -(-len(token_ids) // PAGE_SIZE)
    cache = allocate_kv_cache(
        model.config, model.config.num_hidden_layers + 1, num_pages, PAGE_SIZE, torch.float32, torch.device("cpu")
    ).fill_(float("nan"))
    batch = build_batch([Extend(token_ids, 0, list(range(num_pages))[::-1])], PAGE_SIZE)
    with torch.inference_mode():
        return model.target(batch.input_ids, batch.metadata, cache), cache


def load_transformers(folder: Path, num_layers: int) -> Any:
    cls = transformers.Glm4MoeForCausalLM
    cls._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{num_layers}\..*"]
    return cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_target_logits_equal_transformers(name: str, kernels: str, tmp_path: Path) -> None:
    config = tiny_config(**CONFIGS[name])
    write_checkpoint(tmp_path, config, seed=len(name))
    model = load_model(CheckpointIndex.open(tmp_path), select(torch.device("cpu"), torch.float32, kernels))
    token_ids = torch.randint(0, config["vocab_size"], (37,), generator=torch.Generator().manual_seed(7)).tolist()
    hidden, _ = forward(model, token_ids)
    ours = model.target.compute_logits(hidden)
    with torch.inference_mode():
        theirs = load_transformers(tmp_path, config["num_hidden_layers"])(torch.tensor([token_ids])).logits[0]
    assert 0.3 < theirs.std() < 10, "the comparison means nothing unless logits are of order 1"
    assert (ours - theirs).abs().max() <= TOLERANCE
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("kernels", KERNELS)
def test_logits_of_an_fp8_checkpoint_equal_transformers_of_its_dequantised_twin(kernels: str, tmp_path: Path) -> None:
    config = fp8_checkpoints.CONFIG
    tensors = fp8_checkpoints.fp8_tensors(config, seed=4, scale_dtype=torch.bfloat16)
    fp8_checkpoints.write(tmp_path / "fp8", config, tensors)
    fp8_checkpoints.write_plain(tmp_path / "plain", config, fp8_checkpoints.dequantised(tensors, torch.float32))
    model = load_model(CheckpointIndex.open(tmp_path / "fp8"), select(torch.device("cpu"), torch.float32, kernels))
    token_ids = list(range(3, 40))
    hidden, _ = forward(model, token_ids)
    with torch.inference_mode():
        theirs = load_transformers(tmp_path / "plain", config["num_hidden_layers"])(torch.tensor([token_ids])).logits[0]
    assert 0.3 < theirs.std() < 10
    assert (model.target.compute_logits(hidden) - theirs).abs().max() <= TOLERANCE


def test_reads_what_save_pretrained_writes(tmp_path: Path) -> None:
    """Round trip through transformers' own writer and key style (it drops the MTP layer, keeps its number)."""
    config = tiny_config()
    write_checkpoint(tmp_path / "a", config, seed=3)
    write_files(tmp_path / "b", config)
    theirs = load_transformers(tmp_path / "a", config["num_hidden_layers"])
    theirs.save_pretrained(tmp_path / "b")
    model = load_model(CheckpointIndex.open(tmp_path / "b"), select(torch.device("cpu"), torch.float32, "reference"))
    assert model.config.num_nextn_predict_layers == 1
    assert model.mtp is None
    token_ids = list(range(20, 60))
    hidden, _ = forward(model, token_ids)
    with torch.inference_mode():
        expected = theirs(torch.tensor([token_ids])).logits[0]
    assert (model.target.compute_logits(hidden) - expected).abs().max() <= TOLERANCE


def test_fused_expert_tensors_equal_per_expert_ones(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config, seed=1)
    fused = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts."
        part = {
            kind: torch.stack([tensors[f"{prefix}{e}.{kind}_proj.weight"] for e in range(config["n_routed_experts"])])
            for kind in ("gate", "up", "down")
        }
        fused[prefix + "gate_up_proj"] = torch.cat([part["gate"], part["up"]], 1)
        fused[prefix + "down_proj"] = part["down"]
    logits = []
    for name, content in (("split", tensors), ("fused", fused)):
        write_files(tmp_path / name, config)
        save_file(content, str(tmp_path / name / "model.safetensors"))
        model = load_model(
            CheckpointIndex.open(tmp_path / name), select(torch.device("cpu"), torch.float32, "reference")
        )
        logits.append(model.target.compute_logits(forward(model, list(range(30)))[0]))
    assert torch.equal(*logits)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["plain", "air-like", "groups", "all-dense", "tied", "odd-sizes", "narrow-rotary"])
def test_mtp_logits_of_step_one_equal_transformers(name: str, kernels: str, tmp_path: Path) -> None:
    from transformers.modeling_layers import MtpModel

    config = tiny_config(**CONFIGS[name])
    write_checkpoint(tmp_path, config, seed=11 + len(name))
    model = load_model(CheckpointIndex.open(tmp_path), select(torch.device("cpu"), torch.float32, kernels))
    assert model.mtp is not None
    token_ids = torch.randint(0, config["vocab_size"], (29,), generator=torch.Generator().manual_seed(5)).tolist()
    hidden, cache = forward(model, token_ids)
    pairs = build_batch([Extend(token_ids[1:], 0, list(range(cache.shape[1])))], PAGE_SIZE)
    with torch.inference_mode():
        output = model.mtp.draft(hidden[:-1], pairs.input_ids, pairs.metadata, cache[-1])
        ours = model.target.compute_logits(output.normed)

        main = load_transformers(tmp_path, config["num_hidden_layers"])
        oracle = MtpModel.from_pretrained(main).eval()
        theirs_hidden = main.model(torch.tensor([token_ids])).last_hidden_state
        theirs = oracle.forward_layer(
            0,
            theirs_hidden[:, :-1],
            torch.arange(1, len(token_ids))[None],
            None,
            input_ids=torch.tensor([token_ids[1:]]),
        )
        theirs = oracle._project_to_logits(theirs)[0]
    assert 0.3 < theirs.std() < 10
    assert (ours - theirs).abs().max() <= TOLERANCE
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
