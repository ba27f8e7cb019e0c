"""Small checkpoints for tests: written by the layout's documentation, not by the loader's own table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from specdec.kernels import KernelsUnavailableError
from specdec.kernels.cpu.build import library_path


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _why_no_compiler() -> str:
    try:
        library_path()
    except KernelsUnavailableError as error:
        return f"the C++ kernels cannot be compiled here: {error}"
    return ""


WHY_NO_COMPILER = _why_no_compiler()
NEEDS_COMPILER = pytest.mark.skipif(WHY_NO_COMPILER != "", reason=WHY_NO_COMPILER)
KERNELS = ["reference", pytest.param("cpu", marks=NEEDS_COMPILER)]
# In which decisions are the same on every CPU and whatever rows share the batch: the C++ kernels have a row's bits in
# any of their own; torch's products, which the reference uses, round as the CPU and the shape would have it, which in
# float64 is far below every margin.
EXACT_DTYPES = {"reference": "float64", "cpu": "auto"}
PROMPTS = ["a", "hello world", "x" * 70, "The quick brown fox", "\n\n", "0123456789" * 5, "zz top"]
SPECIAL_TOKENS = ["<|endoftext|>", "<|user|>", "<|assistant|>"]
BYTE_VOCAB = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}/nothink{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """config.json of a model with every part of the architecture, in the older key style."""
    config = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": True,
        "use_qk_norm": True,
        "vocab_size": BYTE_VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": [0],
        "pad_token_id": 0,
    }
    return config | overrides


def layer_shapes(c: dict[str, Any], dense: bool) -> dict[str, tuple[int, ...]]:
    """Tensor names below `model.layers.{i}.` -> shapes."""
    h, d = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
        "self_attn.q_proj.weight": (q, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, q),
    }
    if c["attention_bias"]:
        shapes |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if c["use_qk_norm"]:
        shapes |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}

    def mlp(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.gate_proj.weight": (width, h),
            f"{prefix}.up_proj.weight": (width, h),
            f"{prefix}.down_proj.weight": (h, width),
        }

    if dense:
        return shapes | mlp("mlp", c["intermediate_size"])
    shapes |= {
        "mlp.gate.weight": (c["n_routed_experts"], h),
        "mlp.gate.e_score_correction_bias": (c["n_routed_experts"],),
    }
    for e in range(c["n_routed_experts"]):
        shapes |= mlp(f"mlp.experts.{e}", c["moe_intermediate_size"])
    return shapes | mlp("mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])


def tensor_shapes(c: dict[str, Any], *, with_mtp: bool = True) -> dict[str, tuple[int, ...]]:
    h, v, layers = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, h)
    for i in range(layers):
        dense = i < c["first_k_dense_replace"]
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer_shapes(c, dense).items()}
    if with_mtp:
        extra = {
            "enorm.weight": (h,),
            "hnorm.weight": (h,),
            "eh_proj.weight": (h, 2 * h),
            "shared_head.norm.weight": (h,),
        }
        shapes |= {f"model.layers.{layers}.{name}": shape for name, shape in (layer_shapes(c, False) | extra).items()}
    return shapes


def random_tensors(
    c: dict[str, Any], seed: int, *, with_mtp: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights that give activations and logits of order 1; norms near 1, correction biases spread by 0.1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(c, with_mtp=with_mtp).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            tensors[name] = 0.1 * noise
            continue
        if "norm" in name:
            noise = 1 + 0.1 * noise
        elif name.endswith(".bias"):
            noise = 0.1 * noise
        elif "embed_tokens" not in name:
            noise = noise * shape[-1] ** -0.5
        tensors[name] = noise.to(dtype)
    return tensors


def byte_tokenizer() -> Tokenizer:
    """One token per byte, no merges; ids 0.. are the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i + len(SPECIAL_TOKENS) for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # special tokens must come first: rebuild the vocabulary with them in place
    vocab = {t: i for i, t in enumerate(SPECIAL_TOKENS)} | {c: i + len(SPECIAL_TOKENS) for i, c in enumerate(alphabet)}
    tokenizer.model = BPE(vocab=vocab, merges=[])
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def write_files(folder: Path, config: dict[str, Any], *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Everything of a checkpoint but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config: dict[str, Any] = {"eos_token": "<|endoftext|>"}
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def write_checkpoint(
    folder: Path,
    config: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    with_mtp: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A complete random checkpoint in one shard."""
    config = tiny_config() if config is None else config
    write_files(folder, config)
    save_file(random_tensors(config, seed, with_mtp=with_mtp, dtype=dtype), str(folder / "model.safetensors"))
    return folder


def planted_tensors(c: dict[str, Any], seed: int, *, noise: float, sharpness: float = 0.15) -> dict[str, Tensor]:
    """Weights with a known greedy chain, x -> pi(x), that the MTP layer drafts with errors growing with `noise`.

    Layers hardly write to the residual stream, so the final hidden state is the token's embedding; the
    head maps it to pi(x). Greedy text is one long cycle; drafts are right where the noise allows.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = random_tensors(c, seed)
    h, v, mtp = c["hidden_size"], c["vocab_size"], f"model.layers.{c['num_hidden_layers']}."
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.mul_(0.02)
        elif name.endswith("shared_head.norm.weight"):
            tensor.copy_(1 + 0.5 * torch.randn(h, generator=generator))  # else recycling before or after it is the same
        elif name.endswith("norm.weight") and "_norm" not in name:
            tensor.fill_(1.0)
    embed = torch.randn(v, h, generator=generator)
    cycle = torch.randperm(v, generator=generator)
    head = torch.empty(v, h)
    head[cycle.roll(-1)] = sharpness * embed[cycle]
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = embed, head
    errors = torch.randn(h, 2 * h, generator=generator) * h**-0.5
    tensors[mtp + "eh_proj.weight"] = torch.cat([torch.eye(h), torch.zeros(h, h)], 1) + noise * errors
    return tensors


def write_planted_checkpoint(
    folder: Path, config: dict[str, Any] | None = None, *, seed: int = 0, noise: float = 0.7, sharpness: float = 0.15
) -> Path:
    """A checkpoint whose drafts are accepted now and then."""
    config = tiny_config() if config is None else config
    write_files(folder, config)
    save_file(planted_tensors(config, seed, noise=noise, sharpness=sharpness), str(folder / "model.safetensors"))
    return folder
