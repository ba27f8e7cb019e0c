"""Trains the bundled checkpoint on a CPU and writes it in GLM-4.5's layout.

    python -m specdec.model.bundled.train --work ~/specdec-train --steps 4500

A run is resumed from WORK/state.pt when that exists; `--steps` may differ then, because the learning
rate is constant until the decay begins. Every stage is a function of (seed, step), so an interrupted
run continues as if it had not been. On two cores a step of 4,096 tokens takes 1.3 to 2.5 s.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from specdec.model.bundled.corpus import Document, load_documents
from specdec.model.bundled.muon import Muon
from specdec.model.bundled.network import Network, NetworkConfig
from specdec.model.bundled.tokenizer import END_OF_TEXT, train_tokenizer

TOKENS_PER_STEP = 4096


@dataclass(frozen=True)
class Phase:
    """A part of the training."""

    start: float
    """When it begins, as a fraction of all steps."""
    length: int
    """Tokens of a window."""
    mtp_steps: int
    """How many drafts the MTP layer is unrolled for."""


PHASES = (Phase(0.0, 256, 1), Phase(0.60, 512, 3), Phase(0.88, 1024, 3))


@dataclass(frozen=True)
class Recipe:
    """How the network is trained."""

    muon_lr: float = 0.02
    """Learning rate of the hidden matrices."""
    embed_lr: float = 0.03
    """Learning rate of the embeddings."""
    head_lr: float = 0.008
    """Learning rate of the head."""
    other_lr: float = 0.01
    """Learning rate of norms and routers."""
    warmup_steps: int = 40
    """Steps over which learning rates rise."""
    decay_start: float = 0.5
    """Fraction of all steps after which learning rates fall."""
    mtp_weight: float = 0.3
    """Weight of the MTP layer's loss; the target's has 1."""
    mtp_scored_fraction: float = 0.25
    """Share of the positions that are scored at each draft of the MTP layer."""
    balance_rate: float = 0.01
    """Step by which a router's bias is nudged towards an even load."""
    seed: int = 0
    """Seed of weights, windows and scored positions."""

    def lr_factor(self, step: int, steps: int) -> float:
        """Returns the factor of all learning rates: linear warm-up, constant, then linear decay to zero."""
        decay = (steps - step) / max(1.0, steps * (1 - self.decay_start))
        return min(1.0, (step + 1) / self.warmup_steps, decay)


class Windows:
    """Batches of windows of a token stream: each epoch visits every window once, in an order of its own."""

    def __init__(self, tokens: Tensor, length: int, seed: int) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        self.batch_size = TOKENS_PER_STEP // length
        self.num_batches = (len(tokens) - 2 * length) // length // self.batch_size

    def batch(self, step: int) -> Tensor:  # [B, length + 1]
        epoch, index = divmod(step, self.num_batches)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        offset = int(torch.randint(self.length, (1,), generator=generator))
        order = torch.randperm(self.num_batches * self.batch_size, generator=generator)
        starts = order[index * self.batch_size : (index + 1) * self.batch_size] * self.length + offset
        return torch.stack([self.tokens[s : s + self.length + 1] for s in starts.tolist()])


def losses(net: Network, tokens: Tensor, mtp_steps: int, recipe: Recipe, step: int) -> tuple[Tensor, list[Tensor]]:
    """Returns the cross-entropy of the target at every position, and of each MTP step at a random quarter.

    Early on the MTP layer learns the text itself; once it is unrolled, the target's own distribution,
    since that is what decides acceptance.
    """
    hidden, outputs = net(tokens, mtp_steps)
    logits = net.lm_head(hidden)  # [B, T, V]
    target_loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].reshape(-1))
    t = hidden.shape[1]
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    mtp_losses = []
    for output in outputs:
        # rows 2..t-2: every chain is complete, and the target has a row for the predicted token
        rows = 2 + torch.randperm(t - 3, generator=generator)[: int(t * recipe.mtp_scored_fraction)]
        scored = net.lm_head(output[:, rows]).flatten(0, 1)  # [B*S, V]
        if mtp_steps == 1:
            labels = tokens[:, rows + 2].reshape(-1)
        else:
            labels = logits.detach()[:, rows + 1].flatten(0, 1).softmax(-1)
        mtp_losses.append(F.cross_entropy(scored, labels))
    return target_loss, mtp_losses


def make_optimizers(net: Network, recipe: Recipe) -> list[torch.optim.Optimizer]:
    groups: dict[str, list[Tensor]] = {"muon": [], "embed": [], "head": [], "other": []}
    for name, p in net.named_parameters():
        if name.startswith("embed_tokens"):
            groups["embed"].append(p)
        elif name.startswith("lm_head"):
            groups["head"].append(p)
        elif p.dim() >= 2 and not name.endswith("mlp.gate.weight"):
            groups["muon"].append(p)
        else:
            groups["other"].append(p)
    adam = [
        {"params": groups["embed"], "lr": recipe.embed_lr},
        {"params": groups["head"], "lr": recipe.head_lr},
        {"params": groups["other"], "lr": recipe.other_lr},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(groups["muon"], lr=recipe.muon_lr),
        torch.optim.AdamW(adam, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def evaluate(
    net: Network, tokens: Tensor, text_bytes: int, length: int = 512, num_windows: int = 32
) -> dict[str, float]:
    """Returns figures of held-out text: nats per token, bits per byte, and how often drafts equal the target's choices.

    net: the network.
    tokens: [n], the held-out text.
    text_bytes: its length in bytes.
    length, num_windows: evenly spaced windows that are evaluated.
    """
    stride = (len(tokens) - length - 1) // num_windows
    windows = torch.stack([tokens[i * stride : i * stride + length + 1] for i in range(num_windows)])
    total, agreed = 0.0, [0.0, 0.0, 0.0]
    for chunk in windows.split(8):
        hidden, outputs = net(chunk, 3)
        logits = net.lm_head(hidden)
        total += F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].reshape(-1)).item() * len(chunk) / num_windows
        choice = logits.argmax(-1)
        for j, output in enumerate(outputs):
            draft = net.lm_head(output[:, 2:-1]).argmax(-1)
            agreed[j] += (draft == choice[:, 3:]).float().mean().item() * len(chunk) / num_windows
    for moe in net.moe_layers().values():
        moe.load.zero_()
    bits_per_byte = total / math.log(2) * len(tokens) / text_bytes
    return {
        "nats_per_token": total,
        "bits_per_byte": bits_per_byte,
        **{f"agree_{j + 1}": a for j, a in enumerate(agreed)},
    }


def train(work: Path, output: Path, steps: int, recipe: Recipe, cfg: NetworkConfig) -> None:
    """Trains from the state in `work`, if there is one, up to step number `steps`, and writes the checkpoint to
    `output`."""
    work.mkdir(parents=True, exist_ok=True)
    documents = load_documents()
    training = [d for d in documents if not d.held_out]
    held_out = [d for d in documents if d.held_out]
    tokenizer_path = work / "tokenizer.json"
    if not tokenizer_path.exists():
        train_tokenizer((d.text for d in training), cfg.vocab_size).save(str(tokenizer_path))
    tokens = encode(tokenizer_path, training)
    held_out_tokens = encode(tokenizer_path, held_out)
    held_out_bytes = sum(len(d.text.encode()) for d in held_out)
    log(work, f"{len(training)} documents, {len(tokens)} tokens; held out {len(held_out)}, {len(held_out_tokens)}")

    torch.manual_seed(recipe.seed)
    net = Network(cfg)
    optimizers = make_optimizers(net, recipe)
    state_path, start = work / "state.pt", 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        net.load_state_dict(state["network"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        start = state["step"]
    log(work, f"{sum(p.numel() for p in net.parameters())} parameters; steps {start}..{steps}; {asdict(recipe)}")

    windows = {phase.length: Windows(tokens, phase.length, recipe.seed) for phase in PHASES}
    began = time.perf_counter()
    for step in range(start, steps):
        phase = [p for p in PHASES if step >= p.start * steps][-1]
        factor = recipe.lr_factor(step, steps)
        target_loss, mtp_losses = losses(net, windows[phase.length].batch(step), phase.mtp_steps, recipe, step)
        (target_loss + recipe.mtp_weight * torch.stack(mtp_losses).mean()).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            mtp = " ".join(f"{loss.item():.3f}" for loss in mtp_losses)
            imbalance = max((m.load.max() / m.load.mean()).item() for m in net.moe_layers().values())
            rate = (step + 1 - start) * TOKENS_PER_STEP / (time.perf_counter() - began)
            log(
                work, f"step {step} target {target_loss.item():.3f} mtp {mtp} max-load {imbalance:.2f} tok/s {rate:.0f}"
            )
        for moe in net.moe_layers().values():
            moe.balance(recipe.balance_rate * factor)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            saved = {"network": net.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}
            torch.save(saved, state_path.with_suffix(".tmp"))
            state_path.with_suffix(".tmp").replace(state_path)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            figures = evaluate(net, held_out_tokens, held_out_bytes)
            log(work, f"eval {step + 1} " + " ".join(f"{k} {v:.4f}" for k, v in figures.items()))
    export(net, tokenizer_path, held_out, output)


def encode(tokenizer_path: Path, documents: list[Document]) -> Tensor:
    """Returns all documents' token ids [n], every document followed by the end-of-text token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    return torch.tensor([t for e in encodings for t in [*e.ids, end]])


def export(net: Network, tokenizer_path: Path, held_out: list[Document], output: Path) -> None:
    """Writes a complete checkpoint directory."""
    output.mkdir(parents=True, exist_ok=True)
    save_file(net.export_tensors(), str(output / "model.safetensors"), metadata={"format": "pt"})
    documents = {
        "config.json": net.cfg.hf_config(),
        "generation_config.json": {"eos_token_id": [0], "pad_token_id": 0, "temperature": 1.0, "do_sample": True},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": net.cfg.max_position_embeddings,
        },
        "held_out.json": [d.name for d in held_out],
    }
    for name, content in documents.items():
        (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (output / "tokenizer.json").write_bytes(tokenizer_path.read_bytes())


def log(work: Path, line: str) -> None:
    line = f"{time.strftime('%H:%M:%S')} {line}"
    print(line, flush=True)
    with (work / "train.log").open("a", encoding="utf-8") as f:
        f.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for state, log and tokenizer")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--steps", type=int, default=4500)
    for name, value in asdict(Recipe()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    args = parser.parse_args()
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
    train(args.work, args.output, args.steps, recipe, NetworkConfig())


if __name__ == "__main__":
    main()
