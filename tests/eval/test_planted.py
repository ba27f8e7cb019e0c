"""Planted checkpoints: their greedy text, their acceptance, and that others read them alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, Glm4MoeForCausalLM

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.eval.speed.planted import (
    SIZES,
    PlantedShape,
    main,
    planted_prompts,
    successors,
    write_planted_checkpoint,
)
from specdec.model.config import load_config
from support.planted_text import greedy_text, load_recipe

SHAPE = PlantedShape(
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=96,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    vocab_size=1024,
    max_position_embeddings=512,
)
PROMPTS = planted_prompts(SHAPE.vocab_size, 8, 5, seed=1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "certain"
    write_planted_checkpoint(folder, SHAPE)
    return folder


def generate(folder: Path, num_speculative_tokens: int, max_tokens: int) -> list:
    engine = Engine.from_pretrained(str(folder), kernels="reference")
    speculation = SpeculationParams(num_speculative_tokens)
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, speculation=speculation)
    return engine.generate(PROMPTS, params)


def shards(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_successors_are_one_cycle_over_the_whole_vocabulary() -> None:
    following, token, seen = successors(300, seed=3).tolist(), 0, set()
    while token not in seen:
        seen.add(token)
        token = following[token]
    assert (len(seen), token) == (300, 0)


@pytest.mark.slow
@pytest.mark.parametrize("num_speculative_tokens", [0, 3])
def test_greedy_text_is_the_cycle_and_every_draft_is_right(planted: Path, num_speculative_tokens: int) -> None:
    outputs = generate(planted, num_speculative_tokens, 40)
    assert [o.token_ids for o in outputs] == [greedy_text(planted, prompt, 40) for prompt in PROMPTS]
    assert all(o.stats.num_accepted_tokens == o.stats.num_draft_tokens for o in outputs)
    assert load_recipe(planted).sigma == 0


@pytest.mark.slow
def test_a_wanted_acceptance_is_realised_at_the_first_draft(tmp_path: Path) -> None:
    wanted = 0.6
    recipe = write_planted_checkpoint(tmp_path / "half", SHAPE, acceptance=wanted)
    assert abs(recipe.draft_agreement - wanted) < 0.003
    outputs = generate(tmp_path / "half", 2, 60)
    drafted = sum(o.stats.reached_per_position[0] for o in outputs)
    accepted = sum(o.stats.accepted_per_position[0] for o in outputs)
    assert drafted > 200
    assert abs(accepted / drafted - wanted) < 4 * (wanted * (1 - wanted) / drafted) ** 0.5
    assert [o.token_ids for o in outputs] == [greedy_text(tmp_path / "half", prompt, 60) for prompt in PROMPTS]


def test_transformers_reads_the_same_text(planted: Path) -> None:
    model = Glm4MoeForCausalLM.from_pretrained(planted, dtype=torch.float32)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # no end token
    ids = torch.tensor(PROMPTS)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20)
    assert found[:, ids.shape[1] :].tolist() == [greedy_text(planted, prompt, 20) for prompt in PROMPTS]
    assert AutoTokenizer.from_pretrained(planted)("añ").input_ids == Engine.from_pretrained(
        str(planted), kernels="reference"
    ).tokenizer.encode("añ")


def test_the_same_seed_gives_the_same_tensors_and_another_seed_others(planted: Path, tmp_path: Path) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        write_planted_checkpoint(tmp_path / name, SHAPE, seed=seed)
    first, again, other = (shards(folder) for folder in (planted, tmp_path / "again", tmp_path / "other"))
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if "norm" not in n and "eh_proj" not in n)


def test_the_command_takes_every_number_and_makes_nothing_but_the_folder(tmp_path: Path) -> None:
    options = ["--size", "tiny", "--hidden-size", "128", "--num-hidden-layers", "2", "--vocab-size", "512"]
    main([str(tmp_path / "made"), *options, "--dtype", "float32", "--seed", "5"])
    config = load_config(tmp_path / "made")
    assert (config.hidden_size, config.num_hidden_layers, config.dtype) == (128, 2, torch.float32)
    assert config.n_routed_experts == SIZES["tiny"].n_routed_experts
    assert json.loads((tmp_path / "made" / "planted.json").read_text())["seed"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"acceptance": 1.5}, r"acceptance = 1.5 must be in \[0.01, 1\]"),
        ({"acceptance": float("nan")}, "acceptance = nan"),
        ({"dtype": "int8"}, "dtype = 'int8' is unknown: choose one of bfloat16, float32"),
        ({"seed": -1}, "seed = -1 must be at least 0"),
        ({"vocab_size": 256}, "vocab_size = 256 must be at least 257"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is no multiple of num_key_value_heads = 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 is below 1"),
        ({"hidden_size": 8}, "hidden_size = 8 is too small to tell 1024 tokens apart"),
    ],
)
def test_nonsense_is_refused_and_leaves_nothing_behind(tmp_path: Path, change: dict, message: str) -> None:
    numbers = {name: value for name, value in change.items() if hasattr(SHAPE, name)}
    options = {name: value for name, value in change.items() if name not in numbers}
    with pytest.raises(ValueError, match=message):
        write_planted_checkpoint(tmp_path / "made", replace(SHAPE, **numbers), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_and_stays_as_it_is(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load_recipe(planted)
    with pytest.raises(ValueError, match="is not an empty folder: choose another one"):
        write_planted_checkpoint(planted, SHAPE, seed=9)
    with pytest.raises(SystemExit, match="2"):
        main([str(planted), "--size", "tiny"])
    assert "is not an empty folder" in capsys.readouterr().err
    assert load_recipe(planted) == before


def test_a_prompt_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="length = 0 must be at least 1"):
        planted_prompts(300, 1, 0)
