"""How many bytes and operations a model needs, by its config alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from specdec.model.config import ARCHITECTURE, Glm4MoeConfig, parse_config, read_json
from specdec.model.hub import resolve_model

ROUTER_BYTES = 4  # routers and their correction biases stay in fp32, as `specdec.loading.weight_bytes` counts them


@dataclass(frozen=True)
class Precision:
    """Bytes per value, by what the value belongs to.

    attention, mlp: matrices of the target; mtp: those of the MTP layer. embedding: embeddings, head and eh_proj.
    vector: norms and biases. kv: keys and values. matmul: whose FLOP/s apply. Scales of quantised matrices are left
    out, per output channel they are less than 0.1 %.
    """

    name: str
    attention: float
    mlp: float
    mtp: float
    embedding: float = 2
    vector: float = 2
    kv: float = 2
    matmul: Literal["bf16", "fp8"] = "bf16"


# fp8 as in the published checkpoints (compressed-tensors): linears and experts, but neither embeddings nor eh_proj.
PRECISIONS = {"bf16": Precision("bf16", 2, 2, 2), "fp8": Precision("fp8", 1, 1, 1, matmul="fp8")}


def find_precision(dtype: str) -> Precision:
    """ValueError for an unknown name."""
    try:
        return PRECISIONS[dtype]
    except KeyError:
        raise ValueError(f"dtype = {dtype!r} is unknown: choose one of {', '.join(PRECISIONS)}") from None


@dataclass(frozen=True)
class ModelShape:
    """Numbers of values, of one layer where it does not say otherwise. The MTP layer is one more layer with experts.

    num_dense_layers: the first ones, without experts. attention_vectors: its biases and norms of queries and keys.
    shared_weights: of the shared experts together, expert_weights: of one routed expert. kv_values: of one token;
    kv_shards: over how many GPUs they can be split, beyond that they are copied. attention_flops: of one query with one
    key.
    """

    name: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_dense_layers: int
    num_heads: int
    num_experts: int
    experts_per_token: int
    attention_weights: int
    attention_vectors: int
    dense_weights: int
    shared_weights: int
    expert_weights: int
    kv_values: int
    kv_shards: int
    attention_flops: int
    max_context_length: int
    tied_head: bool = False
    has_mtp: bool = True

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def router_bytes(self) -> int:
        return ROUTER_BYTES * self.num_experts * (self.hidden_size + 1)

    def distinct_experts(self, num_rows: float) -> float:
        """U(n) = E (1 - (1 - k/E)^n): expected distinct experts of one layer for n rows that choose independently."""
        experts = self.num_experts
        return float(experts * (1 - (1 - self.experts_per_token / experts) ** num_rows))

    def target_bytes(self, precision: Precision, num_experts: float) -> float:
        """Of all layers with `num_experts` routed experts each, the final norm and the head; no embeddings."""
        dense, moe = self.num_dense_layers * self.dense_weights, self.num_moe_layers
        layers = self.num_layers * self._attention_bytes(precision, precision.attention)
        layers += precision.mlp * (dense + moe * (self.shared_weights + num_experts * self.expert_weights))
        return layers + moe * self.router_bytes + self._norm_and_head_bytes(precision)

    def mtp_bytes(self, precision: Precision, num_experts: float) -> float:
        """The same of the MTP layer with its three norms and eh_proj; the head is the target's."""
        layer = self._attention_bytes(precision, precision.mtp) + self.router_bytes
        layer += precision.mtp * (self.shared_weights + num_experts * self.expert_weights)
        fusion = precision.embedding * 2 * self.hidden_size**2 + precision.vector * 2 * self.hidden_size
        return layer + fusion + self._norm_and_head_bytes(precision)

    def weight_bytes(self, precision: Precision, with_mtp: bool) -> float:
        """Of all weights, as they lie in memory."""
        head = precision.embedding * self.vocab_size * self.hidden_size
        total = self.target_bytes(precision, self.num_experts) + (0 if self.tied_head else head)
        if with_mtp:
            total += self.mtp_bytes(precision, self.num_experts) - head
        return total

    def _attention_bytes(self, precision: Precision, bytes_per_weight: float) -> float:
        """With the layer's two norms."""
        vectors = self.attention_vectors + 2 * self.hidden_size
        return bytes_per_weight * self.attention_weights + precision.vector * vectors

    def _norm_and_head_bytes(self, precision: Precision) -> float:
        return precision.vector * self.hidden_size + precision.embedding * self.vocab_size * self.hidden_size

    @property
    def target_flops(self) -> int:
        """Of one row in all matrices but the head."""
        moe = self.shared_weights + self.experts_per_token * self.expert_weights + self.num_experts * self.hidden_size
        layers = self.num_layers * self.attention_weights + self.num_dense_layers * self.dense_weights
        return 2 * (layers + self.num_moe_layers * moe)

    @property
    def mtp_flops(self) -> int:
        moe = self.shared_weights + self.experts_per_token * self.expert_weights + self.num_experts * self.hidden_size
        return 2 * (self.attention_weights + moe + 2 * self.hidden_size**2)

    @property
    def head_flops(self) -> int:
        return 2 * self.vocab_size * self.hidden_size


def shape_of(config: Glm4MoeConfig, name: str) -> ModelShape:
    hidden, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    biases = (queries + 2 * keys) * config.attention_bias
    return ModelShape(
        name=name,
        hidden_size=hidden,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_dense_layers=min(config.first_k_dense_replace, config.num_hidden_layers),
        num_heads=config.num_attention_heads,
        num_experts=config.n_routed_experts,
        experts_per_token=config.num_experts_per_tok,
        attention_weights=hidden * (2 * queries + 2 * keys),
        attention_vectors=biases + 2 * head_dim * config.use_qk_norm,
        dense_weights=3 * hidden * config.intermediate_size,
        shared_weights=3 * hidden * config.moe_intermediate_size * config.n_shared_experts,
        expert_weights=3 * hidden * config.moe_intermediate_size,
        kv_values=2 * keys,
        kv_shards=config.num_key_value_heads,
        attention_flops=4 * queries,
        max_context_length=config.max_position_embeddings,
        tied_head=config.tie_word_embeddings,
        has_mtp=config.num_nextn_predict_layers > 0,
    )


def _glm_config(**changes: Any) -> dict[str, Any]:
    """config.json of GLM-4.5 with `changes`, as published by zai-org on the Hugging Face Hub."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "glm4_moe",
        "vocab_size": 151552,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 92,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 160,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": [151329, 151336, 151338],
    } | changes


CONFIGS = {
    "glm-4.5": _glm_config(),
    "glm-4.5-air": _glm_config(
        hidden_size=4096, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=46,
        use_qk_norm=False, n_routed_experts=128, first_k_dense_replace=1, routed_scaling_factor=1.0,
    ),
    "glm-4.6": _glm_config(max_position_embeddings=202752),
    "glm-4.7": _glm_config(max_position_embeddings=202752),
}  # fmt: skip

# Not an architecture of this engine, only a record of sizes, for the points published of it. Multi-head latent
# attention: ranks 1,536 (queries) and 512 (keys and values), 128 heads of 128 + 64 dims, values of 128; cached are 512
# + 64 values per token for all heads together, so that every GPU keeps all of them.
# https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/configs/config_671B.json
DEEPSEEK_V3 = ModelShape(
    name="deepseek-v3",
    hidden_size=7168,
    vocab_size=129280,
    num_layers=61,
    num_dense_layers=3,
    num_heads=128,
    num_experts=256,
    experts_per_token=8,
    attention_weights=7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168,
    attention_vectors=1536 + 512,
    dense_weights=3 * 7168 * 18432,
    shared_weights=3 * 7168 * 2048,
    expert_weights=3 * 7168 * 2048,
    kv_values=512 + 64,
    kv_shards=1,
    attention_flops=2 * 128 * (576 + 512),
    max_context_length=163840,
)
NAMES = (*CONFIGS, DEEPSEEK_V3.name)


def load_shape(model: str) -> ModelShape:
    """One of `NAMES`, "bundled", or a config.json or the folder that holds it (nothing is downloaded).

    A config that says it is quantised is read as well, whatever the scheme: weights play no part here.
    ValueError for an unknown name, CheckpointError for a config that is none of Glm4Moe.
    """
    if model.lower() == DEEPSEEK_V3.name:
        return DEEPSEEK_V3
    if model.lower() in CONFIGS:
        return shape_of(parse_config(CONFIGS[model.lower()]), model.lower())
    path = resolve_model(model) if model == "bundled" else Path(model)
    if not path.exists():
        raise ValueError(f"config = {model!r} is no folder or file, and none of {', '.join(NAMES)}, bundled")
    raw = read_json(path / "config.json" if path.is_dir() else path)
    return shape_of(parse_config({**raw, "quantization_config": None}), model)
