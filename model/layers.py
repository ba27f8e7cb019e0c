"""Building blocks shared by the target model and the MTP layer.

Weights only: there is no forward here. `specdec.kernels.decoder` has the mathematics.

A module is built without memory (torch's meta device) and says through `slots` which tensors of a
checkpoint fill its weights; `specdec.model.weights` gives it memory, fills every slot or raises, then
calls `pack` once, which hands the matrices over to the backend. Projections that read the same input
are stored as one matrix. Modules and tensors have the checkpoint's names.

Shapes: T packed tokens, H hidden, I MLP width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from specdec.kernels import AnyBackend, AttentionMetadata, DecoderOutput
from specdec.kernels.data import AttentionWeights, DecoderWeights, HiddenRows, LayerWeights, MLPWeights, MoEWeights
from specdec.kernels.decisions import DraftChain, Drafts, Verified, VerifyBatch
from specdec.kernels.fp8 import E4M3, Fp8Kind, Fp8Matrix
from specdec.model.config import Glm4MoeConfig


@runtime_checkable
class HasSlots(Protocol):
    """A module that is filled from a checkpoint."""

    def slots(self, name: str) -> dict[str, Tensor]:
        """Returns views of the weights, by the names of the tensors that fill them, relative to the module's parent.
        name: the module's own, relative to its parent."""
        ...


def iter_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[HasSlots, dict[str, Tensor]]]:
    """Yields (module, its slots by checkpoint names) for everything below `module`. prefix: of its names."""
    for name, child in module.named_children():
        if isinstance(child, HasSlots):
            yield child, {prefix + relative: view for relative, view in child.slots(name).items()}
        else:
            yield from iter_modules(child, f"{prefix}{name}.")


def iter_slots(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields (checkpoint name, view of the weight it fills) for everything below `module`. prefix: of its names."""
    for _, slots in iter_modules(module, prefix):
        yield from slots.items()


class Matrices(nn.Module):
    """A module that holds matrices, and from `pack` on their packed forms."""

    fp8_kind: ClassVar[Fp8Kind | None] = None
    """What a backend calls them in FP8; None: a checkpoint never has them in FP8."""

    def __init__(self, kernels: AnyBackend) -> None:
        super().__init__()
        self.kernels = kernels
        self.packed: dict[str, Any] = {}

    def store_fp8(self) -> None:
        """Switches the matrices to FP8 with one scale per output row. Call it on the meta device, before memory is
        allocated."""
        for name, weight in list(self.named_parameters(recurse=False)):
            if weight.dim() >= 2:
                setattr(self, name, nn.Parameter(torch.empty_like(weight, dtype=E4M3), requires_grad=False))
                setattr(self, f"{name}_scale", torch.empty(weight.shape[:-1], device=weight.device))

    def pack(self) -> None:
        """Gives the matrices to the backend and lets go of those that it has copied."""
        for name, weight in list(self.named_parameters(recurse=False)):
            if weight.dim() < 2:
                continue
            scale = getattr(self, f"{name}_scale", None)
            self.packed[name] = self.pack_matrix(name, weight if scale is None else Fp8Matrix(weight, scale))
            if self.packed[name] is not weight:
                setattr(self, name, None)
            if scale is not None:
                setattr(self, f"{name}_scale", None)

    def pack_matrix(self, name: str, weight: Tensor | Fp8Matrix) -> Any:
        """Returns the packed form of the matrix of this name."""
        return self.kernels.pack(weight)


def _weight(kernels: AnyBackend, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device="meta", dtype=dtype or kernels.dtype), requires_grad=False)


class RMSNorm(nn.Module):
    """The weight of a norm."""

    def __init__(self, kernels: AnyBackend, size: int) -> None:
        super().__init__()
        self.weight = _weight(kernels, size, dtype=kernels.activation_dtype)

    def slots(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": self.weight}


class Linear(Matrices):
    """One or more projections of the same input, stored as one matrix. parts: their names and numbers of rows, in
    order; None for one that has the module's name."""

    fp8_kind = "linear"
    weight_scale: Tensor | None

    def __init__(
        self,
        kernels: AnyBackend,
        size_in: int,
        size_out: int,
        *,
        bias: bool = False,
        parts: dict[str, int] | None = None,
    ) -> None:
        super().__init__(kernels)
        self.parts = parts
        self.weight = _weight(kernels, size_out, size_in)
        self.register_buffer("weight_scale", None)
        self.bias = _weight(kernels, size_out, dtype=kernels.activation_dtype) if bias else None

    def slots(self, name: str) -> dict[str, Tensor]:
        parts = self.parts or {name: self.weight.shape[0]}
        slots: dict[str, Tensor] = {}
        for suffix in ("weight", "weight_scale", "bias"):
            tensor = getattr(self, suffix)
            if tensor is not None:
                slots |= zip((f"{part}.{suffix}" for part in parts), tensor.split(list(parts.values())))
        return slots


class GateUp(Linear):
    """The gate and up projections of an MLP, gate rows first."""

    def __init__(self, kernels: AnyBackend, hidden_size: int, width: int) -> None:
        super().__init__(kernels, hidden_size, 2 * width, parts={"gate_proj": width, "up_proj": width})

    def pack_matrix(self, name: str, weight: Tensor | Fp8Matrix) -> Any:
        return self.kernels.pack_gate_up(weight)


class Embedding(nn.Module):
    """The token embeddings [V, H]."""

    def __init__(self, kernels: AnyBackend, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = _weight(kernels, vocab_size, hidden_size)

    def slots(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": self.weight}


class RotaryEmbedding:
    """The table of RoPE (Su et al. 2021), shared by all layers: cos_sin [max_positions, rotary_dim] fp32, cosines, then
    sines."""

    def __init__(self, config: Glm4MoeConfig, max_positions: int, device: torch.device) -> None:
        dims = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64, device=device).float()
        inv_freq = 1.0 / config.rope_theta ** (dims / config.rotary_dim)
        angles = torch.arange(max_positions, device=device).float()[:, None] * inv_freq
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], -1)


class Attention(nn.Module):
    """Weights of grouped-query attention with optional bias and qk-norm."""

    def __init__(self, config: Glm4MoeConfig, kernels: AnyBackend) -> None:
        super().__init__()
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.qkv_proj = Linear(
            kernels, config.hidden_size, q_size + 2 * kv_size, bias=config.attention_bias,
            parts={"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
        )  # fmt: skip
        self.o_proj = Linear(kernels, q_size, config.hidden_size)
        self.use_qk_norm = config.use_qk_norm
        if self.use_qk_norm:
            self.q_norm = RMSNorm(kernels, config.head_dim)
            self.k_norm = RMSNorm(kernels, config.head_dim)

    def weights(self) -> AttentionWeights:
        return AttentionWeights(
            qkv=self.qkv_proj.packed["weight"],
            qkv_bias=self.qkv_proj.bias,
            o=self.o_proj.packed["weight"],
            q_norm=self.q_norm.weight if self.use_qk_norm else None,
            k_norm=self.k_norm.weight if self.use_qk_norm else None,
        )


class MLP(nn.Module):
    """Weights of a dense MLP with SwiGLU."""

    def __init__(self, kernels: AnyBackend, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = GateUp(kernels, hidden_size, width)
        self.down_proj = Linear(kernels, width, hidden_size)

    def weights(self) -> MLPWeights:
        return MLPWeights(self.gate_up_proj.packed["weight"], self.down_proj.packed["weight"])


class Router(Matrices):
    """Weight and correction bias of a router. They stay in fp32: in bf16, biases near 7 would decide the routing."""

    def __init__(self, config: Glm4MoeConfig, kernels: AnyBackend) -> None:
        super().__init__(kernels)
        dtype = torch.promote_types(kernels.dtype, torch.float32)
        self.weight = _weight(kernels, config.n_routed_experts, config.hidden_size, dtype=dtype)
        self.e_score_correction_bias = _weight(kernels, config.n_routed_experts, dtype=dtype)

    def slots(self, name: str) -> dict[str, Tensor]:
        return {
            f"{name}.weight": self.weight,
            f"{name}.e_score_correction_bias": self.e_score_correction_bias,
        }

    def pack_matrix(self, name: str, weight: Tensor | Fp8Matrix) -> Any:
        return self.kernels.pack(weight, full_precision=True)


class Experts(Matrices):
    """All routed experts of a layer: gate_up [E, 2I, H] with the gate rows first, down [E, H, I]."""

    fp8_kind = "experts"
    gate_up_scale: Tensor | None
    down_scale: Tensor | None

    def __init__(self, config: Glm4MoeConfig, kernels: AnyBackend) -> None:
        super().__init__(kernels)
        num_experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.width = width
        self.gate_up = _weight(kernels, num_experts, 2 * width, hidden)
        self.down = _weight(kernels, num_experts, hidden, width)
        self.register_buffer("gate_up_scale", None)
        self.register_buffer("down_scale", None)

    def slots(self, name: str) -> dict[str, Tensor]:
        slots = self._split(name, "weight", self.gate_up, self.down)
        if self.gate_up_scale is not None and self.down_scale is not None:
            slots |= self._split(name, "weight_scale", self.gate_up_scale, self.down_scale)
        return slots

    def _split(self, name: str, suffix: str, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
        slots = {}
        for e, (gate_up_e, down_e) in enumerate(zip(gate_up, down)):
            slots[f"{name}.{e}.gate_proj.{suffix}"] = gate_up_e[: self.width]
            slots[f"{name}.{e}.up_proj.{suffix}"] = gate_up_e[self.width :]
            slots[f"{name}.{e}.down_proj.{suffix}"] = down_e
        return slots

    def fused_slots(self, name: str) -> dict[str, Tensor]:
        """Returns the slots of the stacked layout that transformers 5 keeps in memory and may write; none in FP8."""
        if self.gate_up_scale is not None:
            return {}
        return {f"{name}.gate_up_proj": self.gate_up, f"{name}.down_proj": self.down}

    def pack_matrix(self, name: str, weight: Tensor | Fp8Matrix) -> Any:
        return self.kernels.pack_gate_up(weight) if name == "gate_up" else self.kernels.pack(weight)

    def weights(self) -> MLPWeights:
        return MLPWeights(self.packed["gate_up"], self.packed["down"])


class MoE(nn.Module):
    """Weights of routed experts plus shared ones."""

    def __init__(self, config: Glm4MoeConfig, kernels: AnyBackend) -> None:
        super().__init__()
        self.gate = Router(config, kernels)
        self.experts = Experts(config, kernels)
        shared_width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(kernels, config.hidden_size, shared_width)

    def weights(self) -> MoEWeights:
        return MoEWeights(
            router=self.gate.packed["weight"],
            correction_bias=self.gate.e_score_correction_bias,
            experts=self.experts.weights(),
            shared=self.shared_experts.weights(),
        )


class DecoderLayer(nn.Module):
    """Weights of attention and an MLP, dense or a mixture of experts."""

    def __init__(self, config: Glm4MoeConfig, kernels: AnyBackend, *, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(kernels, config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = RMSNorm(kernels, config.hidden_size)
        self.mlp = MLP(kernels, config.hidden_size, config.intermediate_size) if dense else MoE(config, kernels)

    def weights(self) -> LayerWeights:
        return LayerWeights(
            input_norm=self.input_layernorm.weight,
            attention=self.self_attn.weights(),
            post_attention_norm=self.post_attention_layernorm.weight,
            mlp=self.mlp.weights(),
        )


@dataclass(frozen=True)
class DecoderRun:
    """What one run of a decoder read."""

    expert_ids: Tensor
    """[layers, T, k] int64: the experts that its rows chose; -1 in dense layers."""
    kv_lens: list[int]
    """[B]: how many keys each sequence had."""


class Decoder:
    """A decoder as the backend runs it."""

    def __init__(self, kernels: AnyBackend, weights: DecoderWeights) -> None:
        self.kernels, self.weights = kernels, weights
        self.prepared = kernels.prepare(weights)
        self._trace: list[DecoderRun] | None = None

    @contextmanager
    def traced(self) -> Iterator[list[DecoderRun]]:
        """Yields a list that receives every run while the context is entered."""
        runs: list[DecoderRun] = []
        self._trace = runs
        try:
            yield runs
        finally:
            self._trace = None

    def __call__(
        self,
        input_ids: list[int],
        previous: list[HiddenRows] | None,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
    ) -> DecoderOutput:
        """See `Backend.decode`."""
        chosen = self._trace_run(input_ids, metadata)
        return self.kernels.decode(self.prepared, input_ids, previous, metadata, kv_cache, chosen)

    def verify(
        self,
        head: Any,
        input_ids: list[int],
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        verification: VerifyBatch,
    ) -> Verified:
        """See `Backend.verify`."""
        chosen = self._trace_run(input_ids, metadata)
        return self.kernels.verify(self.prepared, head, input_ids, metadata, kv_cache, verification, chosen)

    def _trace_run(self, input_ids: list[int], metadata: AttentionMetadata) -> Tensor | None:
        if self._trace is None:
            return None
        chosen = self._no_experts(len(self.weights.layers), len(input_ids))
        self._trace.append(DecoderRun(chosen, metadata.kv_lens))
        return chosen

    def draft_chain(self, head: Any, chain: DraftChain) -> Drafts:
        """See `Backend.draft_chain`."""
        if self._trace is None:
            return self.kernels.draft_chain(self.prepared, head, chain)
        num_pairs, num, kv_lens = len(chain.input_ids), len(chain.counts), chain.metadata.kv_lens
        chosen = self._no_experts(1, num_pairs + max(0, max(chain.counts) - 1) * num)
        drafts = self.kernels.draft_chain(self.prepared, head, chain, chosen)
        self._trace.append(DecoderRun(chosen[:, :num_pairs], kv_lens))
        for step in range(1, max(chain.counts)):
            ran = [
                b
                for b, ids in enumerate(drafts.token_ids)
                if min(chain.counts[b] - 1, len(ids)) >= step and min(ids) >= 0
            ]
            if ran:
                first = num_pairs + (step - 1) * num
                self._trace.append(DecoderRun(chosen[:, first : first + len(ran)], [kv_lens[b] + step for b in ran]))
        return drafts

    def _no_experts(self, *shape: int) -> Tensor:
        """Returns expert ids [*shape, k], all -1, to be filled with what is chosen."""
        return torch.full((*shape, self.weights.shape.routing.num_experts_per_tok), -1, device=self.kernels.device)
