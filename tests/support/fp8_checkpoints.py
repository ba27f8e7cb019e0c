"""FP8 checkpoints for tests: the layout of zai-org's, written without the loader's help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.fakes import random_tensors, tensor_shapes, tiny_config, write_files

# Multiples of 16 throughout, which products in FP8 need on a GPU.
CONFIG = tiny_config(moe_intermediate_size=32, torch_dtype="bfloat16")


def quantised_names(config: dict[str, Any]) -> list[str]:
    """The projections of attention, MLP, experts and shared experts, the MTP layer's included."""
    return [
        name
        for name in tensor_shapes(config)
        if (".self_attn." in name or ".mlp." in name) and name.endswith("_proj.weight")
    ]


def quantization_config(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """As in GLM-4.5-Air-FP8: `ignore` spells out every module that is not quantised, biases and norms among them."""
    quantised = set(quantised_names(config))
    others = [name for name in tensor_shapes(config) if name not in quantised]
    common = {"actorder": None, "block_structure": None, "group_size": None, "num_bits": 8, "observer_kwargs": {}}
    common |= {"symmetric": True, "type": "float"}
    return {
        "config_groups": {
            "group_0": {
                "input_activations": common | {"dynamic": True, "observer": None, "strategy": "token"},
                "output_activations": None,
                "targets": ["Linear"],
                "weights": common | {"dynamic": False, "observer": "minmax", "strategy": "channel"},
            }
        },
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": [name.removesuffix(".weight") for name in others],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    } | changes


def quantise(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[out, in] -> e4m3 [out, in] and scales [out, 1]."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(scale_dtype)
    return (weight.float() / scale.float()).to(torch.float8_e4m3fn), scale


def fp8_tensors(
    config: dict[str, Any], seed: int = 0, *, tensors: dict[str, Tensor] | None = None, scale_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Random weights, or `tensors`, in bf16, and in FP8 what is quantised."""
    plain = random_tensors(config, seed) if tensors is None else tensors
    stored = {name: t if name.endswith("correction_bias") else t.bfloat16() for name, t in plain.items()}
    for name in quantised_names(config):
        stored[name], stored[f"{name}_scale"] = quantise(stored[name], scale_dtype)
    return stored


def dequantised(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The plain checkpoint that is meant."""
    return {
        name: (t.float() * tensors[f"{name}_scale"].float()).to(dtype) if f"{name}_scale" in tensors else t
        for name, t in tensors.items()
        if not name.endswith("_scale")
    }


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A checkpoint with a quantization_config, `changes` in it."""
    write_files(folder, config | {"quantization_config": quantization_config(config, **changes)})
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


def write_plain(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    write_files(folder, config)
    save_file(tensors, str(folder / "model.safetensors"))
    return folder
