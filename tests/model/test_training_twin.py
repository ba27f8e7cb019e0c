"""The trainable network against the engine's modules: the same logits, the same unrolled drafts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from specdec.cache.pages import allocate_kv_cache
from specdec.kernels import select
from specdec.model.bundled.network import Network, NetworkConfig
from specdec.model.bundled.train import Windows
from specdec.model.weights import CheckpointIndex, load_model
from specdec.step.batch import Extend, build_batch
from support.fakes import byte_tokenizer

CPU = torch.device("cpu")
CONFIG = NetworkConfig(
    vocab_size=120, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3, head_dim=16,
    n_routed_experts=8, max_position_embeddings=64,
)  # fmt: skip


def network() -> Network:
    """No weight stays at its initial zero or one."""
    torch.manual_seed(0)
    net = Network(CONFIG)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.2 * torch.randn_like(p))
            p.copy_(p.bfloat16())
        for moe in net.moe_layers().values():
            moe.gate.e_score_correction_bias.normal_(std=0.1)
    return net


@torch.inference_mode()
def test_export_gives_the_engine_the_same_logits_and_draft_chains(tmp_path: Path) -> None:
    net = network()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.hf_config()))
    save_file(net.export_tensors(), str(tmp_path / "model.safetensors"))
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    model = load_model(CheckpointIndex.open(tmp_path), select(CPU, torch.float32, "reference"))
    assert model.mtp is not None

    length = 40
    tokens = torch.randint(0, CONFIG.vocab_size, (1, length + 1))
    hidden, outputs = net(tokens, 3)
    cache = allocate_kv_cache(model.config, 4, 1, length, torch.float32, CPU)
    batch = build_batch([Extend(tokens[0, :-1].tolist(), 0, [0])], length)
    ours = model.target(batch.input_ids, batch.metadata, cache)
    torch.testing.assert_close(ours, hidden[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.target.compute_logits(ours), net.lm_head(hidden[0]), rtol=1e-4, atol=1e-4)

    # Chains over the text itself: step j of the chain that starts at pair p is the unrolled row p + j - 1.
    for first in (0, 5, length - 3):
        fresh = allocate_kv_cache(model.config, 1, 1, length, torch.float32, CPU)[0]
        previous = ours[: first + 1]
        for step in range(3):
            start, end = (0 if step == 0 else first + step), first + step + 1
            pairs = build_batch([Extend(tokens[0, start + 1 : end + 1].tolist(), start, [0])], length)
            output = model.mtp.draft(previous, pairs.input_ids, pairs.metadata, fresh)
            previous = output.normed[-1:]
            torch.testing.assert_close(previous[0], outputs[step][0, first + step], rtol=1e-4, atol=1e-4)


def test_every_epoch_visits_every_window_once() -> None:
    tokens = torch.arange(256 * 100)
    windows = Windows(tokens, 256, seed=3)
    assert windows.batch_size == 16
    for epoch in range(2):
        steps = range(epoch * windows.num_batches, (epoch + 1) * windows.num_batches)
        batches = [windows.batch(step) for step in steps]
        starts = torch.cat(batches)[:, 0]
        assert len(starts.unique()) == len(starts) == windows.num_batches * 16
        assert len((starts % 256).unique()) == 1
        assert torch.equal(batches[0], windows.batch(epoch * windows.num_batches))
        assert batches[0].shape == (16, 257)
