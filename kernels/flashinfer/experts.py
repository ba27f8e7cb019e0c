"""Mixtures of experts on CUDA: FlashInfer's fused kernel, and grouped matrix products for GPUs that lack it.

Neither waits for the device. Shapes: T tokens, H hidden, I expert width, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from flashinfer.activation import silu_and_mul
from flashinfer.fused_moe import cutlass_fused_moe
from torch import Tensor

from specdec.kernels.flashinfer.requirements import Capability, has_fused_moe
from specdec.kernels.fp8 import Fp8Matrix, fp8_grouped_linear


class Experts(Protocol):
    """Computes a mixture of routed experts."""

    def pack_gate_up(self, weight: Tensor) -> Tensor:
        """Returns weight [E, 2I, H], the gate rows first, in the order that the kernel reads."""
        ...

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """See `Operations.moe`."""
        ...


def experts_for(capability: Capability) -> Experts:
    """Returns the fused kernel where a GPU of this compute capability has it, else grouped products."""
    return FusedExperts() if has_fused_moe(capability) else GroupedExperts()


class FusedExperts:
    """FlashInfer's `cutlass_fused_moe`, which reads the up rows first. Its order of summation is fixed, but not by
    expert id."""

    def pack_gate_up(self, weight: Tensor) -> Tensor:
        gate, up = weight.chunk(2, 1)
        return torch.cat([up, gate], 1)

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        out = torch.empty_like(x)
        cutlass_fused_moe(
            x, expert_ids.int(), expert_weights, gate_up, down, x.dtype, quant_scales=[], output=out,
            use_fused_finalize=False,
        )  # fmt: skip
        return out


class GroupedExperts:
    """Sorts rows by expert and multiplies them in one grouped product, in bf16 or FP8."""

    def pack_gate_up(self, weight: Tensor) -> Tensor:
        return weight

    def __call__(
        self,
        x: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        gate_up: Tensor | Fp8Matrix,
        down: Tensor | Fp8Matrix,
    ) -> Tensor:
        num_tokens, k = expert_ids.shape
        expert_ids, choices = expert_ids.sort(1)  # a row's contributions are added in this order
        experts, order = expert_ids.flatten().sort(stable=True)  # [T * k]
        num_experts = len(gate_up.scales if isinstance(gate_up, Fp8Matrix) else gate_up)
        numbers = torch.arange(num_experts, device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True).int()  # [E], of each expert's rows
        hidden = silu_and_mul(_grouped_linear(x[order // k], gate_up, ends))
        routed = _grouped_linear(hidden, down, ends)  # [T * k, H]
        by_token = torch.empty_like(routed).index_copy_(0, order, routed).view(num_tokens, k, -1)
        return (by_token.float() * expert_weights.gather(1, choices).unsqueeze(-1)).sum(1).to(x.dtype)


def _grouped_linear(x: Tensor, weight: Tensor | Fp8Matrix, ends: Tensor) -> Tensor:
    """Returns rows x [T, in] times their experts' weights [E, out, in], [T, out]. ends: [E], expert e's rows end before
    ends[e]."""
    if isinstance(weight, Fp8Matrix):
        return fp8_grouped_linear(x, weight, ends)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
