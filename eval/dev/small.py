"""Writes a checkpoint of 8 tokens, for `make certify`.

python -m specdec.eval.dev.small FOLDER [--seed 0]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor

from specdec.eval.lossless.certificate import MIN_VOCAB_SIZE
from specdec.eval.speed.planted import ARCHITECTURE_CONFIG, PlantedShape, tensor_shapes
from specdec.model.config import Glm4MoeConfig, parse_config
from specdec.model.weights import mtp_prefix

SMALL_HIDDEN, SMALL_NOISE, SMALL_SHARPNESS = 32, 1.5, 0.07


def write_small_checkpoint(folder: Path, seed: int = 0, vocab_size: int = MIN_VOCAB_SIZE) -> None:
    """Writes a model of so few tokens that contexts come again and again, with every part of the architecture.

    Its layers write little to the residual stream, its head maps each token's embedding to that of another one, with
    distributions flat enough to visit everything, and the MTP layer's projection is so noisy that drafts are accepted
    now and then.

    folder: must be new.
    seed: of all weights.
    vocab_size: number of tokens.
    """
    config = _small_config(vocab_size)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(BPE(vocab={f"<{i}>": i for i in range(vocab_size)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}\n", encoding="utf-8")
    tensors = _small_tensors(parse_config(config), torch.Generator().manual_seed(seed))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _small_config(vocab_size: int) -> dict[str, Any]:
    shape = PlantedShape(
        hidden_size=SMALL_HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        vocab_size=vocab_size,
        max_position_embeddings=512,
    )
    ours = {"attention_bias": True, "torch_dtype": "float32", "eos_token_id": [0], "pad_token_id": 0}
    return asdict(shape) | ARCHITECTURE_CONFIG | ours


def _small_tensors(config: Glm4MoeConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns the tensors by the checkpoint's names."""
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensors[name] = 1 + 0.1 * noise
        elif name.endswith("bias"):
            tensors[name] = 0.1 * noise
        else:
            written = name.endswith(("o_proj.weight", "down_proj.weight"))
            tensors[name] = (0.1 if written else 1.0) * noise * shape[-1] ** -0.5
    embed = torch.randn(config.vocab_size, SMALL_HIDDEN, generator=generator)
    tensors["model.embed_tokens.weight"] = embed
    tensors["lm_head.weight"] = SMALL_SHARPNESS * embed[torch.randperm(config.vocab_size, generator=generator)]
    errors = torch.randn(SMALL_HIDDEN, 2 * SMALL_HIDDEN, generator=generator) * SMALL_HIDDEN**-0.5
    identity = torch.cat([torch.eye(SMALL_HIDDEN), torch.zeros(SMALL_HIDDEN, SMALL_HIDDEN)], 1)
    tensors[f"{mtp_prefix(config)}eh_proj.weight"] = identity + SMALL_NOISE * errors
    return tensors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="must be new")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        write_small_checkpoint(args.folder, args.seed)
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
