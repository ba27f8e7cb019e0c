"""Random FP8 matrices, and what products with them must be."""

from __future__ import annotations

from torch import Tensor

from specdec.kernels.fp8 import E4M3, Fp8Matrix
from support.fakes import randn


def fp8(*shape: int, seed: int) -> Fp8Matrix:
    """Random values over e4m3's range, scales that differ much."""
    values = (randn(*shape, seed=seed) * 100).clamp(-448, 448).to(E4M3)
    return Fp8Matrix(values, randn(*shape[:-1], seed=seed + 1).exp() / 100)


def meant(matrix: Fp8Matrix) -> Tensor:
    return matrix.values.double() * matrix.scales.double().unsqueeze(-1)


def assert_product(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, accumulation: float = 1e-5
) -> None:
    """Within a rounding to bf16, and one more before a bias is added, of x weight^T + bias.

    accumulation: its error, relative to the sum of magnitudes; by default that of fp32.
    """
    exact, size = x @ weight.T, x.abs() @ weight.abs().T
    rounded = exact.abs()
    if bias is not None:
        exact = exact + bias.double()
        rounded = rounded + exact.abs()
    assert ((y.double() - exact).abs() <= 2.0**-8 * rounded + accumulation * size).all()
