"""The checkpoint that ships with the package: its layout, its card, and greedy decoding on held-out prompts."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from safetensors import safe_open

from specdec import Engine, GenerationOutput, SamplingParams, SpeculationParams
from specdec.eval.dev.held_out import TextFigures, WindowFigures, markdown
from specdec.eval.prompts import load_stdlib
from specdec.inspection.checkpoint import inspect_checkpoint
from specdec.model.bundled.corpus import Document
from specdec.model.hub import BUNDLED_FOLDER
from specdec.step.batch import Extend, build_batch

MAX_TOKENS, NUM_PROMPTS = 96, 64
RESULTS = json.loads((BUNDLED_FOLDER / "held_out_results.json").read_text())


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("bundled")


def test_layout_is_glm_4_5s_and_small_enough_to_ship() -> None:
    assert sum(p.stat().st_size for p in BUNDLED_FOLDER.iterdir()) <= 25 * 2**20
    names = {p.name for p in BUNDLED_FOLDER.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "MODEL_CARD.md",
    }
    with safe_open(str(BUNDLED_FOLDER / "model.safetensors"), framework="pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        assert tensors["model.layers.12.eh_proj.weight"].get_shape() == [256, 512]
        assert tensors["model.layers.12.mlp.experts.15.up_proj.weight"].get_dtype() == "BF16"
        assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].get_dtype() == "F32"
    assert not any("embed_tokens" in n or "shared_head.head" in n for n in tensors if n.startswith("model.layers."))


def test_prompts_come_from_modules_that_no_training_step_saw() -> None:
    listed = json.loads((BUNDLED_FOLDER / "held_out.json").read_text())
    assert all(Document(name, "").held_out for name in listed)
    digest = hashlib.sha256(b"ast.py").digest()  # the rule itself, written out once
    assert (int.from_bytes(digest[:4], "big") % 20 == 0) == ("ast.py" in listed)
    prompts = load_stdlib()
    assert {p.source for p in prompts} <= set(listed)
    assert len({p.prompt for p in prompts}) == 96
    assert [p.category for p in prompts[:6]] == ["module", "package", "test"] * 2


@pytest.mark.slow
def test_target_logits_equal_transformers(engine: Engine) -> None:
    transformers = pytest.importorskip("transformers")
    cls = transformers.Glm4MoeForCausalLM
    cls._keys_to_ignore_on_load_unexpected = [r"model\.layers\.12\..*"]
    theirs = cls.from_pretrained(BUNDLED_FOLDER, dtype=torch.float32, attn_implementation="eager").eval()
    cache = engine.runtime.kv_cache
    for prompt in load_stdlib()[:6]:
        token_ids = engine.tokenizer.encode(prompt.prompt)
        batch = build_batch([Extend(token_ids, 0, list(range(cache.shape[1])))], engine.config.page_size)
        with torch.inference_mode():
            hidden = engine.runtime.model.target(batch.input_ids, batch.metadata, cache)
            ours = engine.runtime.model.target.compute_logits(hidden)
            expected = theirs(torch.tensor([token_ids])).logits[0]
        assert (ours - expected).abs().max() <= 1e-4 * max(1.0, expected.std().item())
        assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def greedy(k: int) -> SamplingParams:
    return SamplingParams(max_tokens=MAX_TOKENS, temperature=0, speculation=SpeculationParams(k))


@pytest.fixture(scope="module")
def plain(engine: Engine) -> list[list[int]]:
    """64 held-out prompts x 96 tokens without speculation, one at a time."""
    return [engine.generate(p.prompt, greedy(0))[0].token_ids for p in load_stdlib()[:NUM_PROMPTS]]


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_greedy_output_equals_plain_decoding(engine: Engine, plain: list[list[int]], k: int) -> None:
    prompts = [p.prompt for p in load_stdlib()[:NUM_PROMPTS]]
    assert [engine.generate(p, greedy(k))[0].token_ids for p in prompts] == plain
    batched = engine.generate(prompts, greedy(k))
    assert [o.token_ids for o in batched] == plain
    if k == 3:
        assert_acceptance_is_the_cards(batched)


def assert_acceptance_is_the_cards(outputs: list[GenerationOutput]) -> None:
    """On two thirds of the card's prompts and three quarters of its tokens: within five points of it."""
    (card,) = (a for a in RESULTS["acceptance"] if a["temperature"] == 0)
    for position in range(3):
        reached = sum(o.stats.reached_per_position[position] for o in outputs)
        accepted = sum(o.stats.accepted_per_position[position] for o in outputs)
        assert abs(accepted / reached - card["all"]["conditional"][position]["value"]) < 0.05


@pytest.mark.slow
def test_greedy_batches_without_speculation_equal_single_requests(engine: Engine, plain: list[list[int]]) -> None:
    batched = engine.generate([p.prompt for p in load_stdlib()[:NUM_PROMPTS]], greedy(0))
    assert [o.token_ids for o in batched] == plain


def test_the_mtp_self_check_passes() -> None:
    result = inspect_checkpoint(BUNDLED_FOLDER)
    assert result.mtp_check is not None
    assert result.mtp_check.acceptance > 0.5
    assert not result.mtp_check.near_chance


def test_the_card_shows_the_measured_results(engine: Engine) -> None:
    card = (BUNDLED_FOLDER / "MODEL_CARD.md").read_text()
    text, windows = TextFigures(**RESULTS["text"]), WindowFigures(**RESULTS["windows"])
    assert markdown(text, windows, RESULTS["acceptance"], engine.checkpoint.config) in card
    assert f"{windows.nats_per_token:.2f} nats per token" in card, "the training log's"
    assert all(cell["check"]["passed"] for cell in RESULTS["acceptance"])
    assert "python -m specdec.eval.dev.held_out" in card


@pytest.mark.slow
def test_held_out_text_costs_what_the_card_says(engine: Engine) -> None:
    """Nats per token of the held-out prompts, which are excerpts of the card's documents."""
    cache, nats, count = engine.runtime.kv_cache, 0.0, 0
    for prompt in load_stdlib():
        token_ids = engine.tokenizer.encode(prompt.prompt)
        batch = build_batch([Extend(token_ids, 0, list(range(cache.shape[1])))], engine.config.page_size)
        with torch.inference_mode():
            hidden = engine.runtime.model.target(batch.input_ids, batch.metadata, cache)
            losses = torch.nn.functional.cross_entropy(
                engine.runtime.model.target.compute_logits(hidden[20:-1]), torch.tensor(token_ids[21:]), reduction="sum"
            )
        nats, count = nats + losses.item(), count + len(token_ids) - 21
    assert abs(nats / count - RESULTS["text"]["nats_per_token"]) < 0.5


def test_experts_are_used_evenly() -> None:
    load = RESULTS["text"]["expert_load"]
    assert list(load) == [*(f"layer {i}" for i in range(1, 12)), "MTP layer"]
    for shares in load.values():
        assert math.isclose(sum(shares), 16, rel_tol=1e-6)
        assert min(shares) > 0.2
        assert max(shares) < 3
