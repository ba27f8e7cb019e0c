"""The loader: every fault of a checkpoint is an error that names it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.errors import CheckpointError
from specdec.kernels import select
from specdec.model.weights import CheckpointIndex, LoadedModel, index_tensors, load_model
from support import fp8_checkpoints
from support.fakes import NEEDS_COMPILER, layer_shapes, random_tensors, tiny_config, write_checkpoint, write_files

CONFIG = tiny_config()
FOLDER_KERNELS = select(torch.device("cpu"), torch.float32, "reference")


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    write_files(folder, CONFIG)
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


def write_shards(folder: Path, shards: dict[str, dict[str, Tensor]], indexed: dict[str, str] | None) -> Path:
    write_files(folder, CONFIG)
    for name, tensors in shards.items():
        save_file(tensors, str(folder / name))
    if indexed is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": indexed}))
    return folder


def load(folder: Path) -> LoadedModel:
    return load_model(CheckpointIndex.open(folder), FOLDER_KERNELS)


def weights(model: LoadedModel) -> dict[str, Tensor]:
    parts = {"target": model.target} | ({} if model.mtp is None else {"mtp": model.mtp})
    return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}


def assert_same(a: LoadedModel, b: LoadedModel) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


TENSORS = random_tensors(CONFIG, seed=0)
MTP = {name: tensor for name, tensor in TENSORS.items() if name.startswith("model.layers.2.")}
TARGET = {name: tensor for name, tensor in TENSORS.items() if name not in MTP}


@pytest.mark.parametrize("name", [*layer_shapes(CONFIG, dense=False), "enorm.weight", "shared_head.norm.weight"])
def test_any_missing_mtp_tensor_raises(tmp_path: Path, name: str) -> None:
    full = f"model.layers.2.{name}"
    remaining = {n: t for n, t in TENSORS.items() if n != full}
    with pytest.raises(CheckpointError, match=rf"^the checkpoint lacks 1 tensor: {full}$"):
        load(write(tmp_path, remaining))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TARGET))
def test_any_missing_target_tensor_raises(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^the checkpoint lacks 1 tensor: {name}$"):
        load(write(tmp_path, {n: t for n, t in TENSORS.items() if n != name}))


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    kept = {n: t for n, t in TENSORS.items() if ".experts." not in n}
    with pytest.raises(CheckpointError, match=r"lacks 48 tensors: model.layers.1.mlp.experts.0.down.* and 43 more$"):
        load(write(tmp_path, kept))


def test_unexpected_tensors_raise(tmp_path: Path) -> None:
    extra = TENSORS | {"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(24, 32)}
    with pytest.raises(CheckpointError, match=r"holds 1 tensor: model.layers.1.mlp.experts.8.up_proj.weight, unknown"):
        load(write(tmp_path, extra))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.20.enorm.weight",  # no part of the MTP layer, which is layers.2
        "model.layers.20.embed_tokens.weight",
        "model.layers.2.embed_tokens.weight_extra",
        "model.layers.2.shared_head.bias",
        "model.layers.2.mtp_norm.weight",
    ],
)
def test_names_near_the_mtp_layers_and_the_ignored_ones_are_unexpected(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"holds 1 tensor: {name}, unknown"):
        load(write(tmp_path, TENSORS | {name: torch.zeros(32)}))


def test_stored_frequencies_and_a_head_tied_to_the_embeddings_are_ignored(tmp_path: Path) -> None:
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(2)}
    assert_same(load(write(tmp_path / "new", TENSORS)), load(write(tmp_path / "old", TENSORS | old)))
    tied = tiny_config(tie_word_embeddings=True)
    write_files(tmp_path / "tied", tied)
    stored = random_tensors(tied, 0) | {"lm_head.weight": torch.zeros(259, 32)}
    save_file(stored, str(tmp_path / "tied" / "model.safetensors"))
    model = load(tmp_path / "tied")
    hidden = torch.eye(32)[:2]
    assert torch.equal(model.target.compute_logits(hidden), stored["model.embed_tokens.weight"].T[:2])


def test_wrong_shape_raises(tmp_path: Path) -> None:
    name = "model.layers.2.eh_proj.weight"
    message = rf"^tensor {name} has shape \[64, 32\], config.json asks for \[32, 64\]$"
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path, TENSORS | {name: torch.zeros(64, 32)}))


def test_integer_weights_raise(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    with pytest.raises(
        CheckpointError, match=rf"^tensor {name} has dtype torch.int8, which is not supported: of quant"
    ):
        load(write(tmp_path, TENSORS | {name: torch.zeros(32, 64, dtype=torch.int8)}))


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_truncated_file_raises(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path, TENSORS) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or no safetensors file"):
        load(tmp_path)


def test_no_weights_raise(tmp_path: Path) -> None:
    write_files(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors file"):
        load(tmp_path)


def test_shards_with_and_without_index_give_the_same_model(tmp_path: Path) -> None:
    whole = load(write(tmp_path / "whole", TENSORS))
    names = sorted(TENSORS)
    split = {
        "a.safetensors": {n: TENSORS[n] for n in names[::2]},
        "b.safetensors": {n: TENSORS[n] for n in names[1::2]},
    }
    index = {n: shard for shard, tensors in split.items() for n in tensors}
    assert_same(whole, load(write_shards(tmp_path / "indexed", split, index)))
    assert_same(whole, load(write_shards(tmp_path / "bare", split, None)))


def test_a_shard_that_the_index_forgot_is_read(tmp_path: Path) -> None:
    """GLM-4.7 keeps its MTP layer in an unindexed mtp.safetensors, with copies of embeddings and head."""
    copies = {
        "model.layers.2.embed_tokens.weight": torch.zeros(259, 32),
        "model.layers.2.shared_head.head.weight": torch.zeros(259, 32),
    }
    shards = {"model-00001-of-00001.safetensors": TARGET, "mtp.safetensors": MTP | copies}
    folder = write_shards(tmp_path / "forgot", shards, dict.fromkeys(TARGET, "model-00001-of-00001.safetensors"))
    assert_same(load(write(tmp_path / "whole", TENSORS)), load(folder))


def test_a_tensor_in_two_unindexed_shards_raises(tmp_path: Path) -> None:
    shards = {"a.safetensors": TENSORS, "b.safetensors": {"model.norm.weight": torch.zeros(32)}}
    with pytest.raises(CheckpointError, match=r"model.norm.weight is in both a.safetensors and b.safetensors"):
        load(write_shards(tmp_path, shards, None))


def test_the_index_decides_between_two_shards(tmp_path: Path) -> None:
    stale = {"model.norm.weight": torch.zeros(32)}
    shards = {"a.safetensors": stale, "b.safetensors": TENSORS}
    folder = write_shards(tmp_path, shards, dict.fromkeys(TENSORS, "b.safetensors"))
    assert index_tensors(folder)["model.norm.weight"].name == "b.safetensors"
    assert torch.equal(load(folder).target.model.norm.weight, TENSORS["model.norm.weight"])


def test_faulty_indices_raise(tmp_path: Path) -> None:
    shards = {"a.safetensors": TENSORS}
    for content, message in (
        (dict.fromkeys(TENSORS, "c.safetensors"), r"names the shard 'c.safetensors', which is missing"),
        (
            dict.fromkeys([*TENSORS, "x.weight"], "a.safetensors"),
            r"places tensor x.weight in a.safetensors, which does not",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(write_shards(tmp_path, shards, content))
    (tmp_path / "model.safetensors.index.json").write_text("[1, 2")
    with pytest.raises(CheckpointError, match=r"index.json is not valid JSON"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index.json has no weight_map object"):
        load(tmp_path)


def test_no_mtp_layer_is_seen_from_the_tensors(tmp_path: Path) -> None:
    model = load(write(tmp_path, TARGET))
    assert model.config.num_nextn_predict_layers == 1
    assert model.mtp is None
    write_files(tmp_path / "with", tiny_config(num_nextn_predict_layers=0))
    save_file(TENSORS, str(tmp_path / "with" / "model.safetensors"))
    assert load(tmp_path / "with").mtp is not None


def test_fused_and_separate_experts_together_raise(tmp_path: Path) -> None:
    gate_up = {"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(8, 48, 32)}
    down = {"model.layers.1.mlp.experts.down_proj": torch.zeros(8, 32, 24)}
    for fused in (gate_up, down):
        with pytest.raises(CheckpointError, match=r"experts that are also stored one by one"):
            load(write(tmp_path, TENSORS | fused))
    separate_down = {n: t for n, t in TENSORS.items() if "layers.1.mlp.experts." not in n or "down_proj" in n}
    assert (load(write(tmp_path, separate_down | gate_up)).target.model.layers[1].mlp.experts.gate_up == 0).all()


def test_weights_end_where_they_belong(tmp_path: Path, poisoned_empty: None) -> None:
    """Merged projections and stacked experts, in the kernels' dtype; no byte stays uninitialised."""
    folder = write(tmp_path, {n: t.bfloat16() for n, t in TENSORS.items()})
    model = load(folder)
    for name, p in weights(model).items():
        assert torch.isfinite(p).all(), name
        assert p.dtype == torch.float32
    assert model.mtp is not None
    layer = model.mtp
    t = {n.removeprefix("model.layers.2."): x.bfloat16().float() for n, x in MTP.items()}
    q, k, v = (t[f"self_attn.{x}_proj.weight"] for x in "qkv")
    assert torch.equal(layer.self_attn.qkv_proj.weight, torch.cat([q, k, v]))
    assert torch.equal(layer.mlp.experts.gate_up[3, 24:], t["mlp.experts.3.up_proj.weight"])
    assert torch.equal(layer.mlp.experts.down[7], t["mlp.experts.7.down_proj.weight"])
    assert torch.equal(layer.mlp.shared_experts.gate_up_proj.weight[:24], t["mlp.shared_experts.gate_proj.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "dtype", "stored"),
    [
        ("reference", "float32", "bf16"),
        ("reference", "bfloat16", "bf16"),
        ("reference", "bfloat16", "fp8"),
        pytest.param("cpu", "bfloat16", "bf16", marks=NEEDS_COMPILER),
        pytest.param("cpu", "bfloat16", "fp8", marks=NEEDS_COMPILER),
    ],
)
def test_peak_memory_is_little_more_than_the_weights(tmp_path: Path, kernels: str, dtype: str, stored: str) -> None:
    """Resident peak while loading, in a process of its own; the checkpoint is mapped as it is stored."""
    config = tiny_config(
        hidden_size=512, moe_intermediate_size=512, n_routed_experts=32, num_hidden_layers=4, vocab_size=4096,
        intermediate_size=512, num_attention_heads=8, head_dim=64,
    )  # fmt: skip
    if stored == "fp8":
        fp8_checkpoints.write(tmp_path, config, fp8_checkpoints.fp8_tensors(config, scale_dtype=torch.bfloat16))
    else:
        write_checkpoint(tmp_path, config, dtype=torch.bfloat16)
    script = f"""
import resource, torch
from pathlib import Path
from specdec.kernels import select
from specdec.loading import weight_bytes
from specdec.model.weights import CheckpointIndex, load_model
kernels = select(torch.device("cpu"), torch.{dtype}, {kernels!r})
torch.ones(8, 8) @ torch.ones(8, 8)
index = CheckpointIndex.open(Path({str(tmp_path)!r}))
size = weight_bytes(index.config, kernels, index.has_mtp_layer)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(index, kernels)
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(peak, size)
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    peak, size = map(int, out.split())
    assert size > 200 * 2**20
    assert peak <= 1.2 * size, f"peak {peak / 2**20:.0f} MiB for weights of {size / 2**20:.0f} MiB"
