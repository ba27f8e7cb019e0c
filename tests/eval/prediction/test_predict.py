"""The prediction: best draft length, memory, what is refused; and where acceptance comes from."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import pytest

from specdec.errors import CheckpointError
from specdec.eval.prediction import AcceptanceRates, PredictOptions, parse_acceptance, predict
from specdec.eval.prediction.costs import CostModel, Machine
from specdec.eval.prediction.hardware import GPUS, find_gpu
from specdec.eval.prediction.predict import DEFAULT_BATCH_SIZES, parse_draft_lengths
from specdec.eval.prediction.published import MOST_ROWS
from specdec.eval.prediction.shapes import NAMES, PRECISIONS, load_shape, shape_of
from specdec.model.config import parse_config
from support import acceptance_document
from support.fakes import tiny_config

FP8 = PRECISIONS["fp8"]
RATES = AcceptanceRates.given((0.9, 0.7, 0.5), "test")


def options(**changes: Any) -> PredictOptions:
    given: dict[str, Any] = {"config": "glm-4.5-air", "gpu": "h200", "num_gpus": 2, "dtype": "fp8", "acceptance": RATES}
    return PredictOptions(**given | changes)


def test_an_iteration_is_verification_extend_and_further_steps() -> None:
    prediction = predict(options(batch_sizes=(3,), context_length=500))
    model = prediction.model
    assert [(c.batch_size, c.num_draft_tokens) for c in prediction.cells] == [(3, k) for k in range(4)]
    plain = 3 / model.seconds(model.target(3, 3, 500)).total
    for k, cell in enumerate(prediction.cells):
        length = 1 + sum((0.9, 0.7, 0.5)[:k])
        parts = [model.target(3 * (k + 1), 3, 500)]
        parts += [model.mtp(3 * length, 3, 500)] * (k > 0) + [model.mtp(3, 3, 500)] * (k - 1)
        expected = 3 * length / sum(model.seconds(work).total for work in parts)
        assert cell.mean_acceptance_length == pytest.approx(length)
        assert cell.tokens_per_s == pytest.approx(expected)
        assert cell.tokens_per_s_per_request == pytest.approx(expected / 3)
        assert cell.speedup == pytest.approx(expected / plain)


def test_the_best_draft_length_is_that_of_brute_force() -> None:
    generator = random.Random(1)
    best = set()
    for _ in range(25):
        conditional = (generator.random() for _ in range(8))
        rates = AcceptanceRates.given(accumulate(conditional, mul), "drawn")
        prediction = predict(options(acceptance=rates, batch_sizes=(1, 16), context_length=1000))
        for batch_size in (1, 16):
            speeds = {
                k: prediction.model.tokens_per_s(batch_size, k, 1 + sum(rates.unconditional[:k]), 1000)
                for k in range(9)
            }
            assert prediction.best(batch_size).num_draft_tokens == max(speeds, key=lambda k: speeds[k])
            best.add(prediction.best(batch_size).num_draft_tokens)
    assert {0, 1} < best, "not always the same"


def test_without_acceptance_plain_decoding_is_best_and_with_certainty_the_longest() -> None:
    never = predict(options(acceptance=AcceptanceRates.given((0.0,) * 4, "never"), batch_sizes=(1, 8)))
    always = predict(options(acceptance=AcceptanceRates.given((1.0,) * 4, "always"), batch_sizes=(1, 8)))
    assert [never.best(b).num_draft_tokens for b in (1, 8)] == [0, 0]
    assert [always.best(b).num_draft_tokens for b in (1, 8)] == [4, 4]
    assert never.best(8).speedup == 1


def test_what_is_known_decides_the_draft_lengths() -> None:
    assert predict(options()).draft_lengths == [0, 1, 2, 3]
    assert not predict(options(batch_sizes=(1,))).warnings
    beyond = predict(options(draft_lengths=(0, 5), batch_sizes=(1,)))
    assert "known for draft positions 1 to 3 only; up to 5" in beyond.warnings[0]
    ratio = 0.5 / 0.7
    assert beyond.cells[1].mean_acceptance_length == pytest.approx(1 + 0.9 + 0.7 + 0.5 * (1 + ratio + ratio**2))
    many = predict(options(batch_sizes=(MOST_ROWS, MOST_ROWS + 1), draft_lengths=(0,)))
    assert [c.is_beyond_points for c in many.cells] == [False, True]
    assert "beyond every published point" in many.warnings[0]


def test_only_what_fits_is_predicted() -> None:
    """The pairs that the reference notes say fit, and some that do not."""
    for name, dtype, gpu, num_gpus in (
        ("glm-4.5-air", "fp8", "h200", 1), ("glm-4.5-air", "fp8", "h100", 2), ("glm-4.5-air", "bf16", "h100", 4),
        ("glm-4.6", "fp8", "h100", 8), ("glm-4.7", "bf16", "h200", 8),
    ):  # fmt: skip
        assert predict(options(config=name, dtype=dtype, gpu=gpu, num_gpus=num_gpus)).cells
    with pytest.raises(
        ValueError, match=r"glm-4.5-air in fp8 does not fit 1 x h100: 110\.\d GB .*, of 72\.0 GB; 2 of them would do"
    ):
        predict(options(gpu="h100", num_gpus=1))
    with pytest.raises(ValueError, match=r"glm-4.5 in bf16 does not fit 8 x h100: .*; choose fp8"):
        predict(options(config="glm-4.5", gpu="h100", num_gpus=8, dtype="bf16"))
    with pytest.raises(ValueError, match=r"glm-4.5 in bf16 does not fit 4 x b200: .*; 6 of them would do"):
        predict(options(config="glm-4.5", gpu="b200", num_gpus=4, dtype="bf16"))  # 96 heads are not for 5
    memory = predict(options(num_gpus=1)).memory
    assert 1 < len(memory) < len(DEFAULT_BATCH_SIZES), "the default batch sizes end where memory does"
    most = CostModel(load_shape("glm-4.5-air"), FP8, Machine(GPUS["h200"], 1)).max_batch_size(2048, True)
    assert predict(options(num_gpus=1, batch_sizes=(most,))).cells
    with pytest.raises(ValueError, match=f"does not fit .*; batch sizes up to {most} do"):
        predict(options(num_gpus=1, batch_sizes=(1, most + 1)))


def test_impossible_options_are_refused() -> None:
    for changes, message in (
        ({"gpu": "tpu"}, "gpu = 'tpu' is unknown: choose one of h100, h200, b200"),
        ({"dtype": "int4"}, "dtype = 'int4' is unknown: choose one of bf16, fp8"),
        ({"gpu": "rtx3090"}, "dtype = 'fp8': rtx3090 has no fp8 units"),
        ({"num_gpus": 0}, "num_gpus = 0 must be from 1 to 8"),
        ({"num_gpus": 9}, "num_gpus = 9 must be from 1 to 8"),
        ({"context_length": 0}, "context_length = 0 must be at least 1"),
        ({"batch_sizes": ()}, "one or more integers from 1 on"),
        ({"batch_sizes": (0, 1)}, "one or more integers from 1 on"),
        ({"draft_lengths": (9,)}, "draft_lengths: 9 must be from 0 to 8"),
        ({"draft_lengths": ()}, "draft_lengths must not be empty"),
    ):
        with pytest.raises(ValueError, match=message):
            options(**changes)
    for changes, message in (
        ({"config": "glm-3"}, "config = 'glm-3' is no folder or file, and none of glm-4.5,"),
        ({"num_gpus": 5}, "num_gpus = 5: the 96 heads of glm-4.5-air cannot be split"),
        ({"context_length": 200_000}, "context_length = 200000 exceeds the 131072 of glm-4.5-air"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(options(**changes))
    assert find_gpu("H100") is GPUS["h100"]


def test_a_config_is_a_name_a_file_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(quantization_config={"quant_method": "x"})))
    tiny = shape_of(parse_config(tiny_config()), "tiny")
    for model in (str(tmp_path), str(tmp_path / "config.json")):
        assert replace(load_shape(model), name="tiny") == tiny, "quantised or not is for --dtype to say"
    assert predict(options(config=str(tmp_path), num_gpus=1, context_length=200)).cells
    assert {load_shape(name).name for name in NAMES} == set(NAMES)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(num_nextn_predict_layers=0)))
    without = options(config=str(tmp_path), num_gpus=1, context_length=200)
    assert predict(without).draft_lengths == [0]
    with pytest.raises(ValueError, match="has no MTP layer"):
        predict(replace(without, draft_lengths=(0, 1)))
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(model_type="llama")))
    with pytest.raises(CheckpointError, match="only Glm4MoeForCausalLM"):
        load_shape(str(tmp_path))


def test_acceptance_is_typed_conditional_or_not() -> None:
    assert parse_acceptance("0.9,0.7,0.5").unconditional == (0.9, 0.7, 0.5)
    assert parse_acceptance("conditional:0.9,0.8,1").unconditional == pytest.approx((0.9, 0.72, 0.72))
    assert parse_acceptance("0.9,0.6").mean_length(2) == pytest.approx(2.5)
    assert parse_acceptance("0.5,0").extended(4).unconditional == (0.5, 0, 0, 0)
    assert parse_acceptance("0").extended(2).unconditional == (0, 0)
    for text, message in (
        ("0.9,0.95", "0.95 at draft position 2 exceeds 0.9 at the one before; .*'conditional:'"),
        ("1.2", "1.2 at draft position 1 must be from 0 to 1"),
        ("conditional:0.9,-0.1", "-0.1 at draft position 2 must be from 0 to 1"),
        ("nowhere.json", "nowhere.json does not exist"),
        ("nan", "nan does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_acceptance(text)
    with pytest.raises(ValueError, match=r"choose among the cells of a results.json"):
        parse_acceptance("0.9", temperature=1.0)


def test_acceptance_comes_from_the_cell_with_the_most_positions(tmp_path: Path) -> None:
    document = acceptance_document.document()
    for cell in document["cells"]:
        if cell["batch_size"] > 1:
            cell["all"]["unconditional"] = [acceptance_document.estimate(0.01) for _ in cell["all"]["unconditional"]]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    rates = parse_acceptance(str(path), temperature=0.6, verification="block")
    assert rates.unconditional == pytest.approx([0.74**i for i in range(1, 6)])
    assert "temperature 0.6, verification block, draft sampling sampled, K = 5" in rates.source
    assert parse_acceptance(str(tmp_path), temperature=0.0).unconditional == pytest.approx(
        [0.92**i for i in range(1, 6)]
    )
    with pytest.raises(ValueError, match=r"several kinds of cells, .*verification block.*: choose with --temperature"):
        parse_acceptance(str(path), temperature=1.0)
    with pytest.raises(ValueError, match=r"no cell with drafts of temperature 0.3; it has temperature 0.0"):
        parse_acceptance(str(path), temperature=0.3)
    with pytest.raises(
        ValueError, match=r"no cell with drafts of temperature 0.6, verification token, draft sampling g"
    ):
        parse_acceptance(str(path), 0.6, "token", "greedy")


def test_acceptance_that_rises_by_chance_or_is_unknown(tmp_path: Path) -> None:
    document = acceptance_document.document((0.0,), lengths=(4,), batch_sizes=(1,))
    unconditional = document["cells"][-1]["all"]["unconditional"]
    for estimate, value in zip(unconditional, (0.8, 0.81, 0.6, None)):
        estimate["value"] = value
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    assert parse_acceptance(str(path)).unconditional == (0.8, 0.8, 0.6)
    unconditional[0]["value"] = None
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="nothing was drafted"):
        parse_acceptance(str(path))


def test_draft_lengths_are_a_list_or_a_range() -> None:
    assert parse_draft_lengths("0..3") == (0, 1, 2, 3)
    assert parse_draft_lengths("0,2") == (0, 2)
    for text in ("", "0..", "a", "1;2"):
        with pytest.raises(ValueError, match=r"must be like 0..4 or 0,1,3"):
            parse_draft_lengths(text)
