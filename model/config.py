"""Reads the config.json of a Glm4Moe checkpoint into a `Glm4MoeConfig`.

What a checkpoint must say has no default here: the defaults of transformers' class differ from the
published checkpoints (attention_bias, for one), so a missing key is an error, not a guess. Both
generations of key names are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specdec.checks import is_integer, is_number, require
from specdec.errors import CheckpointError
from specdec.kernels import RoutingConfig
from specdec.model.quantization import Fp8Scheme, parse_quantization

ARCHITECTURE = "Glm4MoeForCausalLM"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Glm4MoeConfig:
    """The facts of the architecture that the engine needs; names as in config.json. Raises CheckpointError for values
    that contradict each other or are not supported."""

    vocab_size: int
    """Token ids are below it, V."""
    hidden_size: int
    """Size of a hidden state, H."""
    intermediate_size: int
    """Width of a dense layer's MLP."""
    moe_intermediate_size: int
    """Width of one expert, I."""
    num_hidden_layers: int
    """Layers of the target, without the MTP layer."""
    num_nextn_predict_layers: int
    """MTP layers, 0 or 1."""
    num_attention_heads: int
    """Query heads, Hq."""
    num_key_value_heads: int
    """Key and value heads, Hkv."""
    head_dim: int
    """Size of a head, D."""
    attention_bias: bool
    """Whether projections of queries, keys and values have a bias."""
    use_qk_norm: bool
    """Whether queries and keys are normed."""
    n_routed_experts: int
    """Routed experts of a layer, E."""
    n_shared_experts: int
    """Experts of a layer that serve every token."""
    num_experts_per_tok: int
    """Routed experts that a token chooses, k."""
    first_k_dense_replace: int
    """Number of layers, the first ones, that have a dense MLP instead of experts."""
    n_group: int
    """Groups that the experts are divided into."""
    topk_group: int
    """Groups, the best ones, that a token's experts are chosen from."""
    norm_topk_prob: bool
    """Whether the chosen experts' weights are made to sum to 1."""
    routed_scaling_factor: float
    """Factor of the routed experts' weights."""
    rms_norm_eps: float
    """Number that every norm adds to the mean of squares."""
    rope_theta: float
    """Base of RoPE's frequencies."""
    partial_rotary_factor: float
    """Share of a head's dims that RoPE rotates."""
    max_position_embeddings: int
    """The most tokens of a sequence."""
    tie_word_embeddings: bool
    """Whether the embeddings serve as the head."""
    dtype: torch.dtype
    """Dtype of the checkpoint's tensors."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a text."""
    quantization: Fp8Scheme | None
    """Which matrices are in FP8; None where none are."""

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def routing(self) -> RoutingConfig:
        """How experts are chosen."""
        return RoutingConfig(
            num_experts_per_tok=self.num_experts_per_tok,
            n_group=self.n_group,
            topk_group=self.topk_group,
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling_factor=self.routed_scaling_factor,
        )

    def __post_init__(self) -> None:
        try:
            self._check_sizes()
        except ValueError as error:
            raise CheckpointError(f"config.json: {error}") from error
        check_token_ids(self.eos_token_ids, self.vocab_size, "config.json: eos_token_id")

    def _check_sizes(self) -> None:
        for name, low in _LEAST.items():
            value = getattr(self, name)
            require(value >= low, f"{name} = {value} is below {low}")
            require(value <= _MOST, f"{name} = {value} is above {_MOST}")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            require(least <= value <= most, f"{name} = {value:g} must be from {least:g} to {most:g}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        require(
            heads % kv_heads == 0, f"num_attention_heads = {heads} is no multiple of num_key_value_heads = {kv_heads}"
        )
        require(
            self.rotary_dim % 2 == 0 and 0 < self.rotary_dim <= self.head_dim,
            f"partial_rotary_factor = {self.partial_rotary_factor} of head_dim = {self.head_dim} gives "
            f"{self.rotary_dim} rotary dims; an even number from 2 to head_dim is needed",
        )
        experts, groups = self.n_routed_experts, self.n_group
        require(experts % groups == 0, f"n_routed_experts = {experts} is no multiple of n_group = {groups}")
        require(self.topk_group <= groups, f"topk_group = {self.topk_group} exceeds n_group = {groups}")
        if self.topk_group < groups:
            require(experts // groups >= 2, f"{experts} experts in {groups} groups: a group's score needs two experts")
        eligible = experts // groups * self.topk_group
        require(
            self.num_experts_per_tok <= eligible,
            f"num_experts_per_tok = {self.num_experts_per_tok} exceeds the {eligible} experts of the chosen groups",
        )
        require(
            self.num_nextn_predict_layers <= 1,
            f"num_nextn_predict_layers = {self.num_nextn_predict_layers}: only one MTP layer is supported",
        )


_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "moe_intermediate_size": 1,
    "num_hidden_layers": 1,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "n_routed_experts": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 1,
}
_MOST = 2**31 - 1  # of the same
_RANGES = {  # what fp32 and the angles of RoPE can take
    "rms_norm_eps": (1e-30, 1e30),
    "rope_theta": (1.0, 1e30),
    "partial_rotary_factor": (0.0, 1.0),
    "routed_scaling_factor": (-1e30, 1e30),
}


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`. Raises CheckpointError where it is missing, unreadable, broken or no
    object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: a checkpoint folder needs it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, an object is needed")
    return content


def load_config(path: Path) -> Glm4MoeConfig:
    """Reads config.json, given the file or the folder that holds it. Raises CheckpointError."""
    return parse_config(read_json(path / "config.json" if path.is_dir() else path))


def parse_config(raw: Mapping[str, Any]) -> Glm4MoeConfig:
    """Returns the configuration that config.json's content describes. Raises CheckpointError naming the key at
    fault."""
    if raw.get("architectures", [ARCHITECTURE]) != [ARCHITECTURE] or raw.get("model_type") != "glm4_moe":
        raise CheckpointError(
            f"config.json: architectures = {raw.get('architectures')}, model_type = {raw.get('model_type')!r}; "
            f"only {ARCHITECTURE} (model_type 'glm4_moe') is supported"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act = {raw['hidden_act']!r} is not supported, only 'silu'")
    keys = _Keys(raw)
    rope = _rope_parameters(raw)
    return Glm4MoeConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=keys.integer("hidden_size"),
        intermediate_size=keys.integer("intermediate_size"),
        moe_intermediate_size=keys.integer("moe_intermediate_size"),
        num_hidden_layers=keys.integer("num_hidden_layers"),
        num_nextn_predict_layers=keys.integer("num_nextn_predict_layers", "num_mtp_layers", default=0),
        num_attention_heads=keys.integer("num_attention_heads"),
        num_key_value_heads=keys.integer("num_key_value_heads"),
        head_dim=keys.integer("head_dim"),
        attention_bias=keys.boolean("attention_bias"),
        use_qk_norm=keys.boolean("use_qk_norm"),
        n_routed_experts=keys.integer("n_routed_experts", "num_local_experts"),
        n_shared_experts=keys.integer("n_shared_experts"),
        num_experts_per_tok=keys.integer("num_experts_per_tok"),
        first_k_dense_replace=keys.integer("first_k_dense_replace"),
        n_group=keys.integer("n_group"),
        topk_group=keys.integer("topk_group"),
        norm_topk_prob=keys.boolean("norm_topk_prob"),
        routed_scaling_factor=keys.number("routed_scaling_factor"),
        rms_norm_eps=keys.number("rms_norm_eps"),
        rope_theta=rope.number("rope_theta", "rope_parameters.rope_theta"),
        partial_rotary_factor=rope.number("partial_rotary_factor", "rope_parameters.partial_rotary_factor"),
        max_position_embeddings=keys.integer("max_position_embeddings"),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", default=False),
        dtype=_dtype(raw),
        eos_token_ids=parse_token_ids(raw.get("eos_token_id"), "config.json: eos_token_id"),
        quantization=parse_quantization(raw.get("quantization_config")),
    )


class _Keys:
    """Looks values up by key and checks their types; every failure is a CheckpointError that names the key."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def _find(self, names: tuple[str, ...], default: Any = None) -> Any:
        found = {name: self.raw[name] for name in names if self.raw.get(name) is not None}
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            raise CheckpointError(f"config.json: {found} contradict each other")
        if found:
            return values[0]
        if default is None:
            raise CheckpointError(f"config.json: {' or '.join(names)} is missing; it has no safe default")
        return default

    def integer(self, *names: str, default: int | None = None) -> int:
        value = self._find(names, default)
        if not is_integer(value):
            raise CheckpointError(f"config.json: {names[0]} = {value!r} is not an integer")
        return int(value)

    def number(self, *names: str) -> float:
        value = self._find(names)
        if not is_number(value):
            raise CheckpointError(f"config.json: {names[0]} = {value!r} is not a finite number")
        return float(value)

    def boolean(self, *names: str, default: bool | None = None) -> bool:
        value = self._find(names, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {names[0]} = {value!r} is not true or false")
        return value


def _rope_parameters(raw: Mapping[str, Any]) -> _Keys:
    """Returns look-ups that find rope_theta and partial_rotary_factor in both styles. Raises CheckpointError for scaled
    RoPE."""
    for key in ("rope_parameters", "rope_scaling"):
        source = raw.get(key) or {}
        if not isinstance(source, dict):
            raise CheckpointError(f"config.json: {key} = {source!r} is not an object")
        rope_type = source.get("rope_type", source.get("type", "default"))
        if rope_type != "default":
            raise CheckpointError(f"config.json: rope type {rope_type!r} is not supported, only 'default'")
    nested = raw.get("rope_parameters") or {}
    return _Keys(dict(raw) | {f"rope_parameters.{key}": value for key, value in nested.items()})


def _dtype(raw: Mapping[str, Any]) -> torch.dtype:
    name = _Keys(raw)._find(("dtype", "torch_dtype"))
    if not isinstance(name, str) or name not in DTYPES:
        raise CheckpointError(f"config.json: dtype {name!r} is not supported, only {', '.join(DTYPES)}")
    return DTYPES[name]


def check_token_ids(ids: tuple[int, ...], vocab_size: int, where: str) -> None:
    """Raises CheckpointError for an id outside the vocabulary. where: what the message begins with."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise CheckpointError(f"{where} {token} is outside the vocabulary of {vocab_size}")


def parse_token_ids(value: Any, where: str) -> tuple[int, ...]:
    """Returns a token id, a list of them or null as a tuple. Raises CheckpointError for anything else.

    value: what the JSON has.
    where: what the message begins with.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(map(is_integer, ids)):
        raise CheckpointError(f"{where} = {value!r} is not a token id or a list of them")
    return tuple(ids)
