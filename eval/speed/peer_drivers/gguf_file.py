"""Converts a Glm4Moe checkpoint into a GGUF file of architecture glm4moe, MTP layer included.

Matrices keep their values in bf16 or f32; norms, biases and routers are f32. Experts are stacked, nothing is
permuted. The vocabulary is a dummy without end tokens: the file is for prompts of token ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from .protocol import Settings

ARCHITECTURE = "glm4moe"
DTYPES = {"bfloat16": "BF16", "float32": "F32"}
STORED_DTYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F32": np.dtype("<f4")}
EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.\d+\.(\w+_proj)\.weight")
COPIES = ("shared_head.head.weight", "embed_tokens.weight")  # of the MTP layer
OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction": "exp_probs_b",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "shared_head.norm": "nextn.shared_head_norm",
}


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a safetensors file."""

    path: Path
    """The file."""
    dtype: str
    """Its dtype there, "BF16" or "F32"."""
    shape: tuple[int, ...]
    """Its shape."""
    offset: int
    """Where it begins, in bytes."""

    def read(self) -> NDArray[Any]:
        """Returns the raw elements, bf16 as 16-bit integers, mapped rather than loaded."""
        return np.memmap(self.path, STORED_DTYPES[self.dtype], "r", self.offset, self.shape)


def convert(settings: Settings) -> Path:
    """Writes the GGUF file unless the work folder has it already; returns its path."""
    checkpoint = Path(settings.checkpoint).resolve()
    stored = _stored_tensors(checkpoint)
    identity = f"{checkpoint} {[path.stat().st_mtime_ns for path in sorted(checkpoint.glob('*.safetensors'))]}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = Path(settings.work_folder) / f"{checkpoint.name}-{digest}-{settings.dtype}.gguf"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            _write(partial, json.loads((checkpoint / "config.json").read_text()), stored, DTYPES[settings.dtype])
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def _stored_tensors(folder: Path) -> dict[str, Stored]:
    """Returns every tensor of a checkpoint by name, without the MTP layer's copies of embeddings and head."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if not (name.startswith("model.layers.") and name.endswith(COPIES)):
                offset = 8 + header_bytes + entry["data_offsets"][0]
                found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), offset)
    return found


def _groups(stored: dict[str, Stored]) -> dict[str, list[Stored]]:
    """Returns by GGUF name the tensor, or the experts in order that it stacks."""
    groups: dict[str, list[Stored]] = {}
    by_number = sorted(stored, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    for name in by_number:
        groups.setdefault(_gguf_name(EXPERT.sub(r"\1.\2.weight", name)), []).append(stored[name])
    return groups


def _gguf_name(name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    if rest.endswith("e_score_correction_bias"):
        return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('_bias')]}.bias"
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[stem]}.{kind}"


def _write(path: Path, config: dict[str, Any], stored: dict[str, Stored], matrix_dtype: str) -> None:
    """Writes the header with every tensor's shape, then the tensors one after the other."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _add_facts(writer, config, matrix_dtype)
    groups = _groups(stored)
    for name, members in groups.items():
        dtype = _dtype_of(name, members[0], matrix_dtype)
        shape = members[0].shape if len(members) == 1 else (len(members), *members[0].shape)
        num_bytes = int(np.prod(shape)) * STORED_DTYPES[dtype].itemsize
        raw_dtype = gguf.GGMLQuantizationType[dtype]
        writer.add_tensor_info(name, shape, STORED_DTYPES[dtype], num_bytes, raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, members in groups.items():
        dtype = _dtype_of(name, members[0], matrix_dtype)
        writer.write_tensor_data(np.concatenate([_as_dtype(member, dtype).ravel() for member in members]))
    writer.close()


def _dtype_of(name: str, member: Stored, matrix_dtype: str) -> str:
    return matrix_dtype if len(member.shape) == 2 and "ffn_gate_inp" not in name else "F32"


def _as_dtype(member: Stored, dtype: str) -> NDArray[Any]:
    values = member.read()
    if member.dtype == dtype:
        return values
    if dtype == "F32":
        return (values.astype(np.uint32) << 16).view(np.float32)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to the nearest, ties to even


def _add_facts(writer: Any, config: dict[str, Any], matrix_dtype: str) -> None:
    rope = config.get("rope_parameters") or config
    num_mtp_layers = config["num_nextn_predict_layers"]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{matrix_dtype}" if matrix_dtype == "BF16" else "ALL_F32"])
    writer.add_block_count(config["num_hidden_layers"] + num_mtp_layers)
    writer.add_nextn_predict_layers(num_mtp_layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_tokenizer_model("rwkv")  # the one kind of vocabulary that has no end token unless one is named
    writer.add_token_list([f"t{token_id}" for token_id in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
