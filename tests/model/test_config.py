from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.errors import CheckpointError
from specdec.model.config import load_config, parse_config
from support.fakes import tiny_config

# What each published config.json says (GLM-4.5, GLM-4.5-Air, GLM-4.6), abridged to the keys in use.
GLM_4_5: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True, "attention_dropout": 0.0,
    "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 5120, "partial_rotary_factor": 0.5, "initializer_range": 0.02, "intermediate_size": 12288,
    "max_position_embeddings": 131072, "moe_intermediate_size": 1536, "n_group": 1, "topk_group": 1,
    "n_routed_experts": 160, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "num_hidden_layers": 92, "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 2.5, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_qk_norm": True, "vocab_size": 151552,
}  # fmt: skip
REQUIRED = [
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "use_qk_norm", "n_routed_experts",
    "n_shared_experts", "num_experts_per_tok", "first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob",
    "routed_scaling_factor", "rms_norm_eps", "rope_theta", "partial_rotary_factor", "max_position_embeddings",
    "torch_dtype",
]  # fmt: skip


def test_reads_the_published_config() -> None:
    config = parse_config(GLM_4_5)
    assert (config.num_hidden_layers, config.head_dim, config.rotary_dim) == (92, 128, 64)
    assert config.rope_theta == 1e6
    assert config.dtype == torch.bfloat16
    assert config.eos_token_ids == (151329, 151336, 151338)


def test_both_key_styles_mean_the_same() -> None:
    newer = {
        k: v
        for k, v in GLM_4_5.items()
        if k not in ("torch_dtype", "rope_theta", "partial_rotary_factor", "rope_scaling")
    }
    newer |= {
        "dtype": newer.get("torch_dtype", "bfloat16"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": 0.5},
        "num_mtp_layers": newer.pop("num_nextn_predict_layers"),
        "num_local_experts": newer.pop("n_routed_experts"),
    }
    assert parse_config(newer) == parse_config(GLM_4_5)


@pytest.mark.parametrize("key", REQUIRED)
def test_what_a_checkpoint_must_say_has_no_default(key: str) -> None:
    raw = {k: v for k, v in GLM_4_5.items() if k != key}
    alternatives = {"torch_dtype": "dtype or torch_dtype", "n_routed_experts": "n_routed_experts or num_local_experts"}
    alternatives |= {k: f"{k} or rope_parameters.{k}" for k in ("rope_theta", "partial_rotary_factor")}
    name = alternatives.get(key, key)
    with pytest.raises(CheckpointError, match=rf"config.json: {name} is missing"):
        parse_config(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Glm4ForCausalLM"]}, r"architectures = \['Glm4ForCausalLM'\].*only Glm4MoeForCausalLM"),
        ({"model_type": "deepseek_v3"}, r"model_type = 'deepseek_v3'"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not supported, only 'silu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, r"rope type 'yarn' is not supported, only 'default'"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope type 'linear' is not supported"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            r"quantization_config.format = None is not supported",
        ),
        ({"torch_dtype": "int8"}, r"dtype 'int8' is not supported"),
        ({"num_key_value_heads": 7}, r"num_attention_heads = 96 is no multiple of num_key_value_heads = 7"),
        ({"n_group": 7}, r"n_routed_experts = 160 is no multiple of n_group = 7"),
        ({"n_group": 2, "topk_group": 3}, r"topk_group = 3 exceeds n_group = 2"),
        ({"num_experts_per_tok": 161}, r"num_experts_per_tok = 161 exceeds the 160 experts"),
        ({"n_group": 160, "topk_group": 8}, r"a group's score needs two experts"),
        ({"num_nextn_predict_layers": 2}, r"only one MTP layer is supported"),
        ({"partial_rotary_factor": 0.025}, r"gives 3 rotary dims"),
        ({"partial_rotary_factor": 1.5}, r"partial_rotary_factor = 1.5 must be from 0 to 1"),
        ({"hidden_size": 0}, r"hidden_size = 0 is below 1"),
        ({"hidden_size": "5120"}, r"hidden_size = '5120' is not an integer"),
        ({"hidden_size": True}, r"hidden_size = True is not an integer"),
        ({"rms_norm_eps": "x"}, r"rms_norm_eps = 'x' is not a finite number"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps = 0 must be from 1e-30 to 1e\+30"),
        ({"rms_norm_eps": 1e39}, r"rms_norm_eps = 1e\+39 must be from"),
        ({"rope_theta": 1e-300}, r"rope_theta = 1e-300 must be from 1 to 1e\+30"),
        ({"partial_rotary_factor": 1e308}, r"partial_rotary_factor = 1e\+308 must be from 0 to 1"),
        ({"routed_scaling_factor": -1e39}, r"routed_scaling_factor = -1e\+39 must be from"),
        ({"vocab_size": 2**63}, r"vocab_size = 9223372036854775808 is above 2147483647"),
        ({"attention_bias": 1}, r"attention_bias = 1 is not true or false"),
        ({"eos_token_id": "x"}, r"eos_token_id = 'x' is not a token id"),
        ({"eos_token_id": 151552}, r"eos_token_id 151552 is outside the vocabulary of 151552"),
        ({"n_routed_experts": 8, "num_local_experts": 16}, r"contradict each other"),
        ({"rope_parameters": {"rope_theta": 1e4}}, r"'rope_theta': 1000000, .*contradict each other"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\] is not an object"),
        ({"rope_scaling": "linear"}, r"rope_scaling = 'linear' is not an object"),
        ({"quantization_config": "fp8"}, r"quantization_config = 'fp8' is not an object"),
        ({"hidden_size": [5]}, r"hidden_size = \[5\] is not an integer"),
        ({"torch_dtype": {}}, r"dtype {} is not supported"),
        ({"partial_rotary_factor": float("inf")}, r"partial_rotary_factor = inf is not a finite number"),
        ({"rope_theta": 10**400}, r"is not a finite number"),
        ({"routed_scaling_factor": float("nan")}, r"routed_scaling_factor = nan is not a finite number"),
    ],
)
def test_what_is_unknown_or_impossible_raises(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config(GLM_4_5 | change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{not json", r"config.json is not valid JSON"),
        (b"[]", r"config.json holds a JSON list, an object is needed"),
        (b"\xff\xfe", r"config.json cannot be read"),
        (b"[" * 10**5, r"config.json is not valid JSON"),
    ],
)
def test_unreadable_files_raise(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


def test_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        load_config(tmp_path)


def test_tiny_config_is_valid() -> None:
    assert parse_config(tiny_config()).first_k_dense_replace == 1
