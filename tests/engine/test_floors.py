"""What a decode step must read, against sums by hand and over a checkpoint's tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.inspection.floors import Floor, floors
from specdec.inspection.memory import GPUS, fits
from specdec.inspection.step_bytes import expected_distinct
from specdec.model.config import parse_config
from specdec.model.quantization import PUBLISHED, Fp8Scheme
from support.fakes import tensor_shapes
from support.fp8_checkpoints import quantised_names
from support.published_configs import GLM_4_5, GLM_4_5_AIR

AIR_EXPERT = 3 * 4096 * 1408
AIR_ATTENTION = 4096 * (96 + 2 * 8) * 128 + 96 * 128 * 4096


def floors_of(
    raw: dict[str, Any], *, has_mtp: bool = True, scheme: Fp8Scheme = PUBLISHED
) -> dict[tuple[str, str], Floor]:
    config = parse_config(raw)
    found = floors(config, has_mtp, scheme.covers, fits(config, has_mtp, scheme.covers))
    return {(floor.gpu, floor.checkpoint): floor for floor in found}


@pytest.fixture(scope="module")
def air() -> dict[tuple[str, str], Floor]:
    return floors_of(GLM_4_5_AIR)


def read_by_hand(raw: dict[str, Any], num_draft_tokens: int, *, fp8: bool) -> float:
    """Summed over the tensors of a checkpoint: routers in fp32, in FP8 a byte per weight and a fp32 scale per output
    channel. With K drafts T = K + 1 rows of the target, and passes of T, 1, .., 1 rows of the MTP layer."""
    quantised, num_layers = set(quantised_names(raw)) if fp8 else set(), raw["num_hidden_layers"]
    experts, chosen, rows = raw["n_routed_experts"], raw["num_experts_per_tok"], num_draft_tokens + 1
    passes = [rows, *[1] * (num_draft_tokens - 1)] if num_draft_tokens else []
    total = 0.0
    for name, shape in tensor_shapes(raw).items():
        size = torch.Size(shape).numel()
        size = size + 4 * shape[0] if name in quantised else size * (4 if ".mlp.gate." in name else 2)
        runs = passes if name.startswith(f"model.layers.{num_layers}.") else [rows]
        if ".experts." in name:
            total += sum(size * (1 - (1 - chosen / experts) ** n) for n in runs)
        elif name == "model.embed_tokens.weight":
            total += 2 * raw["hidden_size"] * (rows + sum(passes))
        elif name == "lm_head.weight":
            total += size * (1 + len(passes))
        else:
            total += size * len(runs)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("raw", [GLM_4_5_AIR, GLM_4_5], ids=["Air", "GLM-4.5"])
@pytest.mark.parametrize("checkpoint", ["bfloat16", "fp8"])
def test_bytes_are_those_of_the_checkpoints_tensors(raw: dict[str, Any], checkpoint: str) -> None:
    floor = floors_of(raw)["H200", checkpoint]
    by_hand = [read_by_hand(raw, k, fp8=checkpoint == "fp8") for k in range(6)]
    assert floor.step_bytes == pytest.approx(by_hand, rel=1e-12)


def test_air_in_figures(air: dict[tuple[str, str], Floor]) -> None:
    """In bf16, with K = 0: 46 layers of attention, a dense MLP, 45 layers of 8 experts and a shared one, the head."""
    matrices = 46 * AIR_ATTENTION + 3 * 4096 * 10944 + 45 * 9 * AIR_EXPERT + 151552 * 4096
    vectors = 46 * ((96 + 16) * 128 + 2 * 4096) + 4096
    plain = 2 * (matrices + vectors + 4096) + 45 * 4 * (128 * 4096 + 128)
    assert air["H100", "bfloat16"].step_bytes[0] == plain
    assert plain / 1e9 == pytest.approx(25.65, abs=0.005)
    fp8 = air["H100", "fp8"].step_bytes
    assert [size / 1e9 for size in (fp8[0], fp8[3])] == pytest.approx([13.51, 35.08], abs=0.005)


def test_one_more_draft_is_one_more_pass_and_more_experts(air: dict[tuple[str, str], Floor]) -> None:
    """K = 2 after K = 1, in FP8: the head, eh_proj, a layer with 8 experts and a shared one, and the experts of the
    third row in 45 layers and in the extend."""
    expert = AIR_EXPERT + 4 * (2 * 1408 + 4096)
    attention = AIR_ATTENTION + 4 * ((96 + 16) * 128 + 4096) + 2 * (96 + 16) * 128
    layer = attention + 9 * expert + 4 * (128 * 4096 + 128) + 2 * 2 * 4096
    one_pass = 2 * (151552 * 4096 + 2 * 4096**2 + 3 * 4096) + layer
    more_experts = 46 * expert * (expected_distinct(128, 8, 3) - expected_distinct(128, 8, 2))
    rows = 3 * 2 * 4096
    step_bytes = air["H100", "fp8"].step_bytes
    assert step_bytes[2] - step_bytes[1] == pytest.approx(one_pass + more_experts + rows, rel=1e-12)


def test_distinct_experts() -> None:
    assert expected_distinct(128, 8, 1) == 8
    assert expected_distinct(4, 2, 2) == 3, "the second row meets 2 of the 4 anew with probability a half each"
    assert expected_distinct(128, 8, 1000) == pytest.approx(128)
    assert expected_distinct(128, 8, 4) == pytest.approx(29.12, abs=0.005)


def test_a_floor_is_the_bytes_over_the_bandwidth_of_the_gpus_that_hold_them(air: dict[tuple[str, str], Floor]) -> None:
    bandwidths = {gpu.name: gpu.bytes_per_s for gpu in GPUS}
    assert len(air) == 2 * len(GPUS)
    for floor in air.values():
        assert floor.gpu_bytes_per_s == bandwidths[floor.gpu]
        if floor.num_gpus is None:
            assert floor.step_s is None
        else:
            assert floor.step_s is not None
            assert floor.step_s[0] * floor.num_gpus * floor.gpu_bytes_per_s == pytest.approx(floor.step_bytes[0])
            assert floor.step_s == sorted(floor.step_s)
    counts = {key: floor.num_gpus for key, floor in air.items()}
    assert counts["RTX 4090", "fp8"] is None
    assert (counts["H100", "fp8"], counts["H200", "fp8"], counts["H200", "bfloat16"]) == (2, 1, 2)


@pytest.mark.slow
def test_bytes_are_as_the_gpus_kernels_hold_them(air: dict[tuple[str, str], Floor]) -> None:
    """FP8 experts are dequantised on a B200, everything on an A100."""
    assert air["A100 80GB", "fp8"].step_bytes == air["A100 80GB", "bfloat16"].step_bytes
    more = air["B200", "fp8"].step_bytes[0] - air["H200", "fp8"].step_bytes[0]
    scales = 4 * (2 * 1408 + 4096)
    assert more == 45 * 8 * (AIR_EXPERT - scales)
    attention_plain = Fp8Scheme(("Linear",), (*PUBLISHED.ignore, "re:.*self_attn"))
    other = floors_of(GLM_4_5_AIR, scheme=attention_plain)["H200", "fp8"].step_bytes[0]
    assert other - air["H200", "fp8"].step_bytes[0] == 46 * (AIR_ATTENTION - 4 * ((96 + 16) * 128 + 4096))


@pytest.mark.slow
def test_without_an_mtp_layer_nothing_is_drafted(air: dict[tuple[str, str], Floor]) -> None:
    for key, floor in floors_of(GLM_4_5_AIR, has_mtp=False).items():
        assert floor.step_bytes == air[key].step_bytes[:1]


def test_the_documentation_has_these_figures(air: dict[tuple[str, str], Floor]) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    for floor in air.values():
        sizes = " | ".join(f"{size / 1e9:.2f}" for size in floor.step_bytes)
        assert f"| {floor.checkpoint} | {sizes} |" in documented
        if floor.step_s is not None:
            times = " | ".join(f"{1000 * s:.2f}" for s in floor.step_s)
            assert f"| {floor.gpu} x {floor.num_gpus} | {floor.checkpoint} | {times} |" in documented
