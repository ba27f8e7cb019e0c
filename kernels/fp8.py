"""FP8 matrices as compressed-tensors checkpoints hold them, and products with them in FP8.

e4m3 values with one scale per row: per output channel of a weight, per token of its input, whose scales are taken from
the input itself (dynamic). Products come in bf16, accumulated in fp32. torch has `fp8_linear`'s product for the CPU as
well; nothing in here has run on a GPU.

On a GPU every dimension of a matrix must be a multiple of 16; all of GLM-4.5's are.
Shapes: T rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448

Fp8Kind = Literal["linear", "experts"]
FP8_KINDS: frozenset[Fp8Kind] = frozenset({"linear", "experts"})


@dataclass(frozen=True, eq=False)
class Fp8Matrix:
    """A matrix, or a stack of them, in FP8: scale * value is what is meant."""

    values: Tensor
    """[..., out, in] in e4m3."""
    scales: Tensor
    """[..., out] in fp32, one per output channel."""

    def __post_init__(self) -> None:
        assert self.values.dtype == E4M3
        assert self.scales.dtype == torch.float32
        assert self.scales.shape == self.values.shape[:-1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def dequantise(matrix: Fp8Matrix, dtype: torch.dtype) -> Tensor:
    """Returns scale * value in `dtype`, rounded once from at least fp32; works on one matrix of a stack at a time.

    Exact in fp32 where the scales have at most 20 significant bits, as those stored in bf16 do.
    """
    wide = torch.promote_types(dtype, torch.float32)
    result = torch.empty_like(matrix.values, dtype=dtype)
    size_out, size_in = matrix.values.shape[-2:]
    shape = (-1, size_out, size_in)
    for out, values, scales in zip(result.view(shape), matrix.values.view(shape), matrix.scales.view(shape[:2])):
        out.copy_(values.to(wide) * scales.unsqueeze(-1))
    return result


def plain(weight: Tensor | Fp8Matrix, dtype: torch.dtype) -> Tensor:
    """Returns a plain weight as it is, an FP8 one in `dtype`; for backends that do not compute in FP8."""
    return dequantise(weight, dtype) if isinstance(weight, Fp8Matrix) else weight


def quantise_rows(x: Tensor) -> Fp8Matrix:
    """Quantises x [T, in] with one scale per row: its largest magnitude / 448.

    A quotient exceeds 448 by rounding at most, which the conversion to e4m3 rounds back (it would take 464 to become
    NaN); scales do not fall below the smallest normal number, where this would not hold.
    """
    wide = x.float()
    scales = (wide.abs().amax(-1) / E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return Fp8Matrix((wide / scales.unsqueeze(-1)).to(E4M3), scales)


def fp8_linear(x: Tensor, weight: Fp8Matrix, bias: Tensor | None = None) -> Tensor:
    """Returns x W^T + bias, [T, out] bf16, of x [T, in], weight [out, in], bias [out] bf16. Compute capability 8.9, 9.0
    or 10.0."""
    rows = quantise_rows(x)
    return torch._scaled_mm(
        rows.values,
        weight.values.t(),
        scale_a=rows.scales.unsqueeze(1),  # [T, 1]
        scale_b=weight.scales.unsqueeze(0),  # [1, out]
        bias=bias,
        out_dtype=torch.bfloat16,
    )


def fp8_grouped_linear(x: Tensor, weight: Fp8Matrix, ends: Tensor) -> Tensor:
    """Returns rows x [T, in] times their experts' weights, [T, out] bf16.

    x: [T, in], sorted by expert.
    weight: [E, out, in].
    ends: [E] int32, expert e's rows end before ends[e].

    Nothing is copied to the host, so it can be captured in a CUDA graph. Compute capability 9.0 alone: torch's kernel
    is built for no other, whatever its own check lets pass (pytorch/pytorch pull request 188063).
    """
    rows = quantise_rows(x)
    return torch._scaled_grouped_mm(
        rows.values,
        weight.values.transpose(1, 2),
        rows.scales,
        weight.scales,
        offs=ends,
        out_dtype=torch.bfloat16,
    )
