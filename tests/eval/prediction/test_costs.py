"""What forwards read, compute and wait for, and the limits of their time."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch

from specdec.cache.pages import page_bytes
from specdec.eval.prediction.costs import Constants, CostModel, Machine
from specdec.eval.prediction.hardware import GPU, GPUS
from specdec.eval.prediction.shapes import CONFIGS, PRECISIONS, ModelShape, Precision, load_shape, shape_of
from specdec.kernels import select
from specdec.loading import weight_bytes
from specdec.model.config import DTYPES, load_config, parse_config
from specdec.model.hub import BUNDLED_FOLDER
from support.fakes import tensor_shapes, tiny_config

BF16, FP8 = PRECISIONS["bf16"], PRECISIONS["fp8"]
FP32 = Precision("fp32", 4, 4, 4, embedding=4, vector=4, kv=4)
IDEAL = Constants(bandwidth_share=1, flops_share=1, forward_s=0, layer_s=0, all_reduce_s=0)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": False, "use_qk_norm": False},
    {"n_shared_experts": 3, "first_k_dense_replace": 0},
    {"first_k_dense_replace": 5, "num_hidden_layers": 3},
    {"num_attention_heads": 6, "head_dim": 12, "num_key_value_heads": 3, "num_nextn_predict_layers": 0},
]


def shape(**changes: Any) -> ModelShape:
    return shape_of(parse_config(tiny_config(**changes)), "tiny")


def machine(num_gpus: int = 1, **changes: Any) -> Machine:
    gpu = GPU("test", 1e12, bandwidth=1e9, bf16_flops=1e12, fp8_flops=None, link_bandwidth=1e8, max_gpus=8)
    return Machine(replace(gpu, **changes), num_gpus)


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", BF16), ("float32", FP32)])
def test_weights_take_what_the_loader_allocates(changes: dict[str, Any], dtype: str, precision: Precision) -> None:
    config = parse_config(tiny_config(**changes))
    kernels = select(torch.device("meta"), DTYPES[dtype], "reference")
    for with_mtp in (False, True):
        assert shape(**changes).weight_bytes(precision, with_mtp) == weight_bytes(config, kernels, with_mtp)
    layers = config.num_hidden_layers + 1
    model = CostModel(shape(**changes), precision, machine())
    assert model.memory(3, 50, with_mtp=True).kv_cache == 3 * page_bytes(config, layers, 50, DTYPES[dtype])


@pytest.mark.parametrize("name", [*CONFIGS, "bundled"])
def test_so_do_those_of_real_checkpoints(name: str) -> None:
    config = load_config(BUNDLED_FOLDER) if name == "bundled" else parse_config(CONFIGS[name])
    kernels = select(torch.device("meta"), torch.bfloat16, "reference")
    assert load_shape(name).weight_bytes(BF16, with_mtp=True) == weight_bytes(config, kernels, with_mtp=True)


def test_fp8_is_of_linears_and_experts_only() -> None:
    config = tiny_config()
    total = 0
    for name, size in tensor_shapes(config).items():
        wide = any(part in name for part in ("embed_tokens", "lm_head", "eh_proj", "norm", "bias"))
        per_value = 4 if ".mlp.gate." in name else 2 if wide else 1
        total += per_value * math.prod(size)
    assert shape().weight_bytes(FP8, with_mtp=True) == total


def test_known_sizes() -> None:
    """Those of the reference notes, computed by somebody else."""
    air, large, deepseek = load_shape("glm-4.5-air"), load_shape("GLM-4.5"), load_shape("deepseek-v3")
    gib = 2**30
    for model, bf16, fp8 in ((air, 203.5, 103.1), (large, 664.6, 334.3)):
        assert model.weight_bytes(BF16, True) / gib == pytest.approx(bf16, abs=0.2)
        assert model.weight_bytes(FP8, True) / gib == pytest.approx(fp8, rel=0.002), "they count scales as well"
    for model, kv in ((air, 192_512), (large, 380_928)):
        assert CostModel(model, FP8, machine()).memory(1, 1, with_mtp=True).kv_cache == kv
    for model, precision, target, mtp in (
        (air, BF16, 25.6, 1.84), (air, FP8, 13.4, 1.57), (large, BF16, 65.7, 2.36), (large, FP8, 33.7, 2.01),
    ):  # fmt: skip
        assert model.target_bytes(precision, 8) / 1e9 == pytest.approx(target, abs=0.2)
        assert model.mtp_bytes(precision, 8) / 1e9 == pytest.approx(mtp, abs=0.01)
    assert deepseek.weight_bytes(Precision("one", 1, 1, 1, embedding=1, vector=1), False) / 1e9 == pytest.approx(
        671, abs=0.5
    )


def test_distinct_experts() -> None:
    air = load_shape("glm-4.5-air")
    assert [round(air.distinct_experts(n), 1) for n in range(6)] == [0, 8, 15.5, 22.5, 29.1, 35.3]
    generator = random.Random(0)
    drawn = [
        len({e for _ in range(5) for e in generator.sample(range(air.num_experts), air.experts_per_token)})
        for _ in range(4000)
    ]
    assert statistics.mean(drawn) == pytest.approx(air.distinct_experts(5), rel=0.005)
    assert air.distinct_experts(10_000) == pytest.approx(air.num_experts)


def test_a_forward_reads_its_experts_its_keys_and_the_rest_once() -> None:
    s = shape()
    model = CostModel(s, BF16, machine(), IDEAL)
    one, many = model.target(1, 1, 0), model.target(5, 1, 0)
    per_expert = 2 * s.expert_weights * s.num_moe_layers
    difference = s.distinct_experts(5) - s.distinct_experts(1)
    assert many.read_bytes - one.read_bytes == pytest.approx(difference * per_expert)
    keys = model.target(5, 5, 100).read_bytes - model.target(5, 5, 0).read_bytes
    assert keys == 5 * 100 * s.num_layers * 2 * 2 * 16 * 2, "5 sequences, K and V of 2 heads of 16 in bf16"
    assert model.target(10, 5, 100).read_bytes - model.target(10, 5, 0).read_bytes == keys, "drafts share them"
    everything = model.target(10**9, 1, 0).read_bytes
    embeddings = 2 * s.vocab_size * s.hidden_size
    assert everything == pytest.approx(s.weight_bytes(BF16, with_mtp=False) - embeddings)


def test_reading_alone_is_bytes_over_bandwidth() -> None:
    model = CostModel(shape(), BF16, machine(), IDEAL)
    work = model.target(2, 2, 10)
    assert model.seconds(work).total == work.read_bytes / 1e9
    assert model.tokens_per_s(2, 0, 1, 10) == 2 / (work.read_bytes / 1e9)
    half = replace(model, constants=replace(IDEAL, bandwidth_share=0.5))
    assert half.seconds(work).total == 2 * model.seconds(work).total


def test_a_large_batch_is_bound_by_arithmetic() -> None:
    s = shape()
    model = CostModel(s, BF16, machine(bf16_flops=1e9), replace(IDEAL, flops_share=0.5))
    batch_size = 10**7
    matrices = s.num_layers * s.attention_weights + s.dense_weights + s.vocab_size * s.hidden_size
    matrices += s.shared_weights + 2 * s.expert_weights + s.num_experts * s.hidden_size
    per_token = 2 * matrices + 4 * s.num_layers * 64 * 7  # 7 keys of 4 heads of 16
    assert model.tokens_per_s(batch_size, 0, 1, 7) == pytest.approx(0.5 * 1e9 / per_token, rel=1e-6)
    seconds = model.seconds(model.target(batch_size, batch_size, 7))
    assert seconds.arithmetic > seconds.reading
    assert seconds.total == seconds.arithmetic, "reading overlaps"
    keys = model.target(6, 2, 5).flops - model.target(6, 2, 0).flops
    assert keys == 6 * 5 * s.num_layers * s.attention_flops, "every row looks at its own sequence's"
    drafts = [model.mtp(rows, 2, 0).flops for rows in (2, 6)]
    layer = s.attention_weights + s.shared_weights + 2 * s.expert_weights + (s.num_experts + 2 * s.hidden_size) * 32
    assert drafts[1] - drafts[0] == 4 * 2 * layer, "the head is for the last row of a sequence only"
    assert drafts[0] == 2 * 2 * (layer + s.vocab_size * s.hidden_size)


def test_latency_is_per_forward_and_per_layer() -> None:
    constants = replace(IDEAL, forward_s=1.0, layer_s=10.0)
    model = CostModel(shape(), BF16, machine(bandwidth=1e30, bf16_flops=1e30), constants)
    assert model.iteration(1, 0, 1, 1).total_s == pytest.approx(1 + 2 * 10)
    with_drafts = model.iteration(1, 3, 2.0, 1)
    assert with_drafts.target.total == pytest.approx(21)
    assert with_drafts.extend_s == pytest.approx(11)
    assert with_drafts.steps_s == pytest.approx(2 * 11)
    assert with_drafts.total_s == pytest.approx(21 + 3 * 11)


def test_gpus_share_matrices_and_exchange_rows() -> None:
    s, constants = shape(), replace(IDEAL, all_reduce_s=2.0)
    one, four = (CostModel(s, BF16, machine(n, link_bandwidth=1e3), constants) for n in (1, 4))
    assert four.target(3, 3, 0).read_bytes == one.target(3, 3, 0).read_bytes / 4
    assert four.target(3, 3, 9).flops == one.target(3, 3, 9).flops / 4
    assert one.seconds(one.target(3, 3, 0)).all_reduces == 0
    exchanged = 2 * s.num_layers * 2 * 3 / 4 * 3 * s.hidden_size * 2
    assert four.seconds(four.target(3, 3, 0)).all_reduces == pytest.approx(2 * s.num_layers * 2.0 + exchanged / 1e3)
    keys = [m.target(3, 3, 8).read_bytes - m.target(3, 3, 0).read_bytes for m in (one, four)]
    assert keys[1] == pytest.approx(keys[0] / 2), "there are two key-value heads to split"
    copied = CostModel(replace(s, kv_shards=1), BF16, machine(4), constants)
    assert copied.memory(1, 8, False).kv_cache == one.memory(1, 8, False).kv_cache, "every GPU keeps all of them"
    assert copied.memory(1, 8, False).weights == one.memory(1, 8, False).weights / 4


def test_gpus_in_turn_are_as_slow_as_one_and_as_large_as_all() -> None:
    one, in_turn = CostModel(shape(), BF16, machine(1)), CostModel(shape(), BF16, replace(machine(4), split="layers"))
    assert in_turn.iteration(2, 2, 1.5, 9) == one.iteration(2, 2, 1.5, 9)
    memory = in_turn.memory(2, 9, True)
    assert memory.weights + memory.kv_cache == pytest.approx(
        (one.memory(2, 9, True).weights + one.memory(2, 9, True).kv_cache) / 4
    )


@pytest.mark.parametrize("k", [0, 1, 4])
def test_more_is_slower_or_faster_as_it_should_be(k: int) -> None:
    model = CostModel(load_shape("glm-4.5"), FP8, Machine(GPUS["h100"], 8))

    def seconds(m: CostModel = model, batch_size: int = 4, context: int = 1000, length: float = 2.0) -> float:
        return m.iteration(batch_size, k, length if k else 1, context).total_s

    assert seconds(batch_size=5) > seconds()
    assert seconds(context=2000) > seconds()
    assert seconds(replace(model, machine=Machine(GPUS["h200"], 8))) < seconds()
    assert seconds(replace(model, machine=Machine(GPUS["h100"], 4))) > seconds()
    assert seconds(replace(model, precision=BF16)) > seconds()
    if k:
        assert seconds(length=2.5) > seconds(), "the draft extend has more rows"
        assert model.tokens_per_s(4, k, 2.5, 1000) > model.tokens_per_s(4, k, 2.0, 1000)
