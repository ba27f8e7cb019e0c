"""Writes planted checkpoints, which have the real cost of an engine at an acceptance that is chosen.

    python -m specdec.eval.speed.planted FOLDER [--size medium|small|tiny] [--hidden-size N ...] [--acceptance 1.0]
                                          [--dtype bfloat16] [--seed 0]

Random weights accept one draft in V, which says nothing about speculation. Here the layers are random but hardly
write to the residual stream (o_proj and down_proj have std 0.002), so the final hidden state is the last token's
embedding, and `lm_head[pi(x)] = 0.05 * embed[x]`, where pi is one cycle over the whole vocabulary. Greedy text is
that cycle, with margins wide enough to be the same in every engine and dtype. The MTP layer reads the same
embedding through `eh_proj = [I + sigma * G | 0]`, G ~ N(0, 1/H): with sigma = 0 every draft is right, and sigma is
bisected until the wanted share of them is.

What is bisected is the share of the vocabulary's V tokens x whose first draft, computed from embedding, eh_proj
and head as rounded to the checkpoint's dtype but *without* the MTP decoder layer, is pi(x). The layer shifts
drafts a little, and a text visits only part of the vocabulary: quote the acceptance that an engine reports on the
prompts used. planted.json keeps sigma and the measured share. The same seed gives the same files on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from specdec.errors import CheckpointError
from specdec.kernels import select
from specdec.model.config import ARCHITECTURE, Glm4MoeConfig, parse_config
from specdec.model.layers import iter_slots
from specdec.model.weights import INDEX_NAME, build_model, mtp_prefix

RECIPE_NAME = "planted.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
END_TOKEN, END_TOKEN_ID = "<|endoftext|>", 0
MIN_VOCAB_SIZE = 257  # the end token and one token per byte
MIN_ACCEPTANCE = 0.01
RESIDUAL_STD, HEAD_SCALE = 0.002, 0.05
MIN_MARGIN = 0.2  # least margin as a share of the greedy logit: the layers' residual writes may take some of it
TOLERANCE = 0.002  # distance from the wanted acceptance that is allowed
LOGITS_BYTES = 2**28
ARCHITECTURE_CONFIG: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "model_type": "glm4_moe",
    "attention_bias": False,
    "use_qk_norm": True,
    "num_nextn_predict_layers": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class PlantedShape:
    """The numbers of config.json that may be chosen, by their names there; see `Glm4MoeConfig`."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    vocab_size: int = 8192
    max_position_embeddings: int = 4096


SIZES = {
    "tiny": PlantedShape(256, 6, 4, 2, 64, 704, 128, 16, 4),  # 16 M parameters
    "small": PlantedShape(512, 8, 8, 2, 64, 1408, 256, 24, 4),  # 96 M
    "medium": PlantedShape(1024, 12, 8, 2, 128, 2816, 512, 32, 4),  # 685 M, 135 M of them read per token
}


@dataclass(frozen=True)
class Recipe:
    """How a planted checkpoint was made."""

    seed: int
    """Seed of all weights."""
    wanted_acceptance: float
    """The acceptance that was asked for."""
    sigma: float
    """Size of the noise in the MTP layer's projection."""
    draft_agreement: float
    """Share of right first drafts over the vocabulary."""


def write_planted_checkpoint(
    folder: Path, shape: PlantedShape, *, acceptance: float = 1.0, dtype: str = "bfloat16", seed: int = 0
) -> Recipe:
    """Writes a checkpoint shard by shard; `folder` appears complete or not at all.

    folder: must be new or empty.
    shape: the sizes.
    acceptance: wanted share of right first drafts.
    dtype: "bfloat16" or "float32".
    seed: of all weights.

    Raises ValueError for a shape, acceptance, dtype or seed that cannot be, and for a folder that is not empty.
    """
    config = _config(shape, dtype)
    _check_request(folder, acceptance, seed)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        recipe = _write_weights(partial, parse_config(config), acceptance, DTYPES[dtype], seed)
        _write_small_files(partial, config, recipe)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return recipe


def successors(vocab_size: int, seed: int) -> Tensor:
    """Returns pi, [V]: the token that follows each token in the greedy text of a checkpoint made with `seed`."""
    order = torch.randperm(vocab_size, generator=_generator(seed, "cycle"))
    following = torch.empty_like(order)
    following[order] = order.roll(-1)
    return following


def planted_prompts(vocab_size: int, num_prompts: int, length: int, seed: int = 0) -> list[list[int]]:
    """Returns prompts of `length` random token ids, none of them the end token.

    The text that follows is the stretch of the cycle after the last id, so different prompts meet different drafts:
    n verified drafts give the acceptance a with a standard error of sqrt(a (1 - a) / n).
    """
    if min(num_prompts, length) < 1:
        raise ValueError(f"num_prompts = {num_prompts} and length = {length} must be at least 1")
    tokens = torch.randint(END_TOKEN_ID + 1, vocab_size, (num_prompts, length), generator=_generator(seed, "prompts"))
    return tokens.tolist()


def _config(shape: PlantedShape, dtype: str) -> dict[str, Any]:
    """Returns the content of config.json. Raises ValueError for a shape that is no model."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    if shape.vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size = {shape.vocab_size} must be at least {MIN_VOCAB_SIZE}: one token per byte")
    config = (
        asdict(shape)
        | ARCHITECTURE_CONFIG
        | {
            "torch_dtype": dtype,
            "eos_token_id": [END_TOKEN_ID],
            "pad_token_id": END_TOKEN_ID,
        }
    )
    try:
        parse_config(config)
    except CheckpointError as error:
        raise ValueError(f"this shape is no Glm4Moe model: {error}; change that number") from error
    return config


def _check_request(folder: Path, acceptance: float, seed: int) -> None:
    if not MIN_ACCEPTANCE <= acceptance <= 1:
        raise ValueError(f"acceptance = {acceptance} must be in [{MIN_ACCEPTANCE}, 1], the share of right first drafts")
    if seed < 0:
        raise ValueError(f"seed = {seed} must be at least 0")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: choose another one, or remove it")


def _generator(seed: int, name: str) -> torch.Generator:
    """Returns random numbers that are independent for every name, whatever else is drawn."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _write_weights(folder: Path, config: Glm4MoeConfig, acceptance: float, dtype: torch.dtype, seed: int) -> Recipe:
    """Writes one shard for embeddings and head, one for each layer, and the index."""
    planted, recipe = _plant(config, acceptance, dtype, seed)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    num_shards = config.num_hidden_layers + 2
    outer = {name: tensor for name, tensor in planted.items() if not name.startswith("model.layers.")}
    layers = (
        {name: planted[name] if name in planted else _random(name, size, dtype, seed) for name, size in shapes.items()}
        for shapes in _layer_shapes(config)
    )
    for number, tensors in enumerate(chain([outer], layers), 1):
        shard = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        save_file(tensors, str(folder / shard), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return recipe


def _plant(config: Glm4MoeConfig, acceptance: float, dtype: torch.dtype, seed: int) -> tuple[dict[str, Tensor], Recipe]:
    """Returns the tensors outside the layers and the MTP layer's eh_proj, and the recipe."""
    hidden_size, vocab_size = config.hidden_size, config.vocab_size
    embed = torch.randn(vocab_size, hidden_size, generator=_generator(seed, "embed_tokens")).to(dtype)
    following = successors(vocab_size, seed)
    head = torch.empty_like(embed)
    head[following] = (HEAD_SCALE * embed.float()).to(dtype)
    _check_margins(embed, head, following)
    noise = torch.randn(hidden_size, hidden_size, generator=_generator(seed, "eh_proj")) * hidden_size**-0.5

    def projection(sigma: float) -> Tensor:
        return (torch.eye(hidden_size) + sigma * noise).to(dtype)

    def agreement(sigma: float) -> float:
        drafts = _logits(_rms_normed(embed) @ projection(sigma).float().T, head)
        return sum(int((row.argmax(-1) == following[at]).sum()) for at, row in drafts) / vocab_size

    sigma, agreed = _bisect(agreement, acceptance, 0.5 / vocab_size)
    planted = {
        "model.embed_tokens.weight": embed,
        "lm_head.weight": head,
        "model.norm.weight": torch.ones(hidden_size, dtype=dtype),
        f"{mtp_prefix(config)}eh_proj.weight": torch.cat([projection(sigma), torch.zeros_like(projection(0))], 1),
    }
    return planted, Recipe(seed, acceptance, sigma, agreed)


def _rms_normed(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def _logits(hidden: Tensor, head: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, their logits [r, V]) of hidden [R, H] and head [V, H], a bounded number of rows at a time."""
    step = max(1, LOGITS_BYTES // (4 * len(head)))
    wide = head.float().T
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        yield rows, hidden[rows].float() @ wide


def _check_margins(embed: Tensor, head: Tensor, following: Tensor) -> None:
    """Raises ValueError for embeddings of so few dimensions that another token comes close to the planted one."""
    least = 1.0
    for rows, logits in _logits(_rms_normed(embed), head):
        wanted = following[rows, None]
        right = logits.gather(1, wanted)
        others = logits.scatter(1, wanted, -torch.inf).amax(1, keepdim=True)
        least = min(least, ((right - others) / right).min().item())
    if least < MIN_MARGIN:
        raise ValueError(
            f"hidden_size = {embed.shape[1]} is too small to tell {len(embed)} tokens apart: the least margin of a "
            f"greedy logit is {least:.2f} of it, {MIN_MARGIN} are needed; raise hidden_size or lower vocab_size"
        )


def _bisect(agreement: Callable[[float], float], wanted: float, resolution: float) -> tuple[float, float]:
    """Returns (sigma, agreement(sigma)) nearest to `wanted`; the agreement falls from 1 as sigma grows."""
    if wanted == 1:
        return 0.0, agreement(0.0)
    low, high = 0.0, 1.0
    while (agreed := agreement(high)) > wanted:
        low, high = high, 2 * high
    sigma = high
    while abs(agreed - wanted) > max(TOLERANCE, resolution) and high - low > 1e-6 * high:
        sigma = (low + high) / 2
        agreed = agreement(sigma)
        low, high = (sigma, high) if agreed > wanted else (low, sigma)
    return sigma, agreed


def tensor_shapes(config: Glm4MoeConfig) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of a checkpoint's tensors, the MTP layer's last."""
    model = build_model(config, select(torch.device("meta"), torch.float32, "reference"), with_mtp=True)
    assert model.mtp is not None
    slots = dict(iter_slots(model.target)) | dict(iter_slots(model.mtp, mtp_prefix(config)))
    return {name: tuple(slot.shape) for name, slot in slots.items()}


def _layer_shapes(config: Glm4MoeConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yields names and shapes layer by layer, the MTP layer last."""
    shapes = tensor_shapes(config)
    for layer in range(config.num_hidden_layers + 1):
        yield {name: shape for name, shape in shapes.items() if name.startswith(f"model.layers.{layer}.")}


def _random(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Returns a layer's tensor: norms 1, correction biases of std 0.1 in fp32, matrices that keep activations of order
    1."""
    if "norm" in name:
        return torch.ones(shape, dtype=dtype)
    noise = torch.randn(shape, generator=_generator(seed, name))
    if name.endswith("e_score_correction_bias"):
        return 0.1 * noise
    std = RESIDUAL_STD if name.endswith(("o_proj.weight", "down_proj.weight")) else shape[-1] ** -0.5
    return (std * noise).to(dtype)


def _write_small_files(folder: Path, config: dict[str, Any], recipe: Recipe) -> None:
    generation = {"eos_token_id": [END_TOKEN_ID], "pad_token_id": END_TOKEN_ID, "do_sample": False}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_TOKEN, "pad_token": END_TOKEN}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "tokenizer_config.json", tokenizer)
    _write_json(folder / RECIPE_NAME, asdict(recipe))
    _byte_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))


def _byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Returns a tokenizer with the end token, one token per byte, and names for the ids that text never becomes."""
    tokens = [END_TOKEN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<{token_id}>" for token_id in range(len(tokens), vocab_size)]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_TOKEN])
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="medium")
    for name in (field.name for field in fields(PlantedShape)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="overrides the size's own")
    parser.add_argument("--acceptance", type=float, default=1.0, help="share of right first drafts (default 1.0)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    chosen = {f.name: getattr(args, f.name) for f in fields(PlantedShape) if getattr(args, f.name) is not None}
    shape = replace(SIZES[args.size], **chosen)
    try:
        recipe = write_planted_checkpoint(
            args.folder, shape, acceptance=args.acceptance, dtype=args.dtype, seed=args.seed
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    size = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))
    print(
        f"{args.folder}: {size / 2**20:.0f} MiB of weights, sigma = {recipe.sigma:.4g}, first drafts right for "
        f"{recipe.draft_agreement:.4f} of the vocabulary (without the MTP decoder layer)",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
