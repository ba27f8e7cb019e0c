"""FP8 matrices: quantisation of rows, dequantisation, and products, whose GPU layouts torch's meta kernels check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.kernels.fp8 import Fp8Matrix, dequantise, fp8_grouped_linear, fp8_linear, plain, quantise_rows
from support.fakes import randn
from support.fp8_products import assert_product, fp8, meant

E4M3 = torch.float8_e4m3fn


def test_rows_are_quantised_each_to_its_own_largest_magnitude() -> None:
    x = (randn(40, 64, seed=1) * randn(40, 1, seed=2).exp() * 10).bfloat16()
    rows = quantise_rows(x)
    assert (rows.values.dtype, rows.scales.shape) == (E4M3, (40,))
    assert (rows.values.float().abs().amax(1) == 448).all()
    assert torch.equal(rows.scales, x.float().abs().amax(1) / 448)
    # e4m3 has three bits after the first one, and below 2^-6 steps of 2^-9; and a fp32 division before it
    bound = torch.maximum(x.abs() * 2.0**-4, rows.scales.unsqueeze(1) * 2.0**-10) * (1 + 1e-6)
    assert ((meant(rows) - x).abs() <= bound).all()
    assert torch.equal(quantise_rows(x[7:8]).values.float(), rows.values[7:8].float())


def test_no_magnitude_overflows() -> None:
    """Every finite bf16 number as the largest of a row, subnormal ones and those next to zero's scale among them."""
    largest = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rows = quantise_rows(torch.stack([largest, -largest, largest / 3, torch.zeros_like(largest)], 1))
    assert rows.values.float().isfinite().all()
    assert rows.scales.isfinite().all()
    normal = largest.float() >= 448 * torch.finfo(torch.float32).tiny * (1 + 2.0**-20)
    assert torch.equal(rows.values[normal, :2].float(), torch.tensor([448.0, -448.0]).expand(int(normal.sum()), 2))
    assert (meant(rows)[0] == 0).all(), "a row of zeros stays one"


@pytest.mark.parametrize("shape", [(48, 32), (3, 48, 32)])
def test_dequantisation_is_exact_in_fp32_and_rounded_once_in_bf16(shape: tuple[int, ...]) -> None:
    matrix = fp8(*shape, seed=3)
    matrix = Fp8Matrix(matrix.values, matrix.scales.bfloat16().float())
    assert torch.equal(dequantise(matrix, torch.float32).double(), meant(matrix))
    assert torch.equal(dequantise(matrix, torch.float64), meant(matrix))
    assert torch.equal(dequantise(matrix, torch.bfloat16), meant(matrix).to(torch.bfloat16))
    assert torch.equal(plain(matrix, torch.float32), dequantise(matrix, torch.float32))
    weight = torch.ones(2, 2, dtype=torch.float16)
    assert plain(weight, torch.float32) is weight


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_the_product_of_what_is_meant(rows: int, biased: bool) -> None:
    x, weight = randn(rows, 64, seed=5).bfloat16(), fp8(48, 64, seed=6)
    bias = randn(48, seed=8).bfloat16() if biased else None
    y = fp8_linear(x, weight, bias)
    assert (y.dtype, y.shape) == (torch.bfloat16, (rows, 48))
    assert_product(y, meant(quantise_rows(x)), meant(weight), bias)


class GroupedDouble:
    """torch._scaled_grouped_mm for the CPU: its meta kernel checks dtypes, shapes and layouts, loops compute."""

    def __init__(self) -> None:
        self.real = torch._scaled_grouped_mm
        self.calls = 0

    def __call__(self, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        metas = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (a, b, scale_a, scale_b)
        ]
        ends = options["offs"]
        out = torch.empty_like(self.real(*metas, **options | {"offs": ends.to("meta")}), device="cpu")
        assert ends.dtype == torch.int32
        assert (a.shape[1] % 16, b.shape[2] % 16) == (0, 0), "what the CUDA kernel needs of every group"
        start = 0
        for e, end in enumerate(ends.tolist()):
            exact = (a[start:end].double() * scale_a[start:end, None]) @ (b[e].double() * scale_b[e])
            out[start:end] = exact.to(out.dtype)
            start = end
        assert start == len(a), "every row belongs to a group"
        return out


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> GroupedDouble:
    double = GroupedDouble()
    monkeypatch.setattr(torch, "_scaled_grouped_mm", double)
    return double


def test_grouped_linear_takes_each_groups_own_expert(grouped: GroupedDouble) -> None:
    x, weight = randn(7, 64, seed=9).bfloat16(), fp8(4, 48, 64, seed=10)
    ends = torch.tensor([2, 2, 6, 7], dtype=torch.int32)  # the second expert has no rows
    y = fp8_grouped_linear(x, weight, ends)
    assert (y.dtype, y.shape, grouped.calls) == (torch.bfloat16, (7, 48), 1)
    rows = meant(quantise_rows(x))
    for e, (start, end) in enumerate([(0, 2), (2, 2), (2, 6), (6, 7)]):
        assert_product(y[start:end], rows[start:end], meant(weight)[e])
