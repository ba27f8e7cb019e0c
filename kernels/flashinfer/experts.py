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

FUSED_SINCE = (8, 9)  # the compute capability from which FlashInfer has cutlass_fused_moe


class Experts(Protocol):
    def pack_gate_up(self, weight: Tensor) -> Tensor:
        """[E, 2I, H], the gate rows first, in the order that the kernel reads."""
        ...

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """See `Kernels.moe`."""
        ...


def experts_for(capability: tuple[int, int]) -> Experts:
    return FusedExperts() if capability >= FUSED_SINCE else GroupedExperts()


class FusedExperts:
    """`cutlass_fused_moe`, which reads the up rows first. Its order of summation is fixed, but not by expert id."""

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
    """Rows sorted by expert, one grouped product for all of them."""

    def pack_gate_up(self, weight: Tensor) -> Tensor:
        return weight

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        num_tokens, k = expert_ids.shape
        expert_ids, choices = expert_ids.sort(1)  # a row's contributions are added in this order
        experts, order = expert_ids.flatten().sort(stable=True)  # [T * k]
        numbers = torch.arange(len(gate_up), device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True).int()  # [E], of each expert's rows
        hidden = silu_and_mul(F.grouped_mm(x[order // k], gate_up.transpose(1, 2), offs=ends))
        routed = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)  # [T * k, H]
        by_token = torch.empty_like(routed).index_copy_(0, order, routed).view(num_tokens, k, -1)
        return (by_token.float() * expert_weights.gather(1, choices).unsqueeze(-1)).sum(1).to(x.dtype)
