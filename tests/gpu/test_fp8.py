"""Products in FP8 on a GPU, by the kernels that it is said to have for them."""

from __future__ import annotations

import pytest
import torch

from specdec.kernels.flashinfer.requirements import fp8_kinds, visible_capability
from specdec.kernels.fp8 import Fp8Kind, Fp8Matrix, fp8_grouped_linear, fp8_linear, quantise_rows
from support.fakes import randn
from support.fp8_products import assert_product, fp8, meant

CAPABILITY = visible_capability()
ACCUMULATION = 2.0**-12  # Hopper's FP8 units keep about 14 bits while they add (arXiv 2412.19437, section 3.3.2)


def needs(kind: Fp8Kind) -> pytest.MarkDecorator:
    there = CAPABILITY is not None and kind in fp8_kinds(CAPABILITY)
    return pytest.mark.skipif(not there, reason=f"needs a GPU whose {kind} products are in FP8, here: {CAPABILITY}")


def on_gpu(matrix: Fp8Matrix) -> Fp8Matrix:
    return Fp8Matrix(matrix.values.cuda(), matrix.scales.cuda())


@needs("linear")
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(rows: int, biased: bool) -> None:
    x, weight = randn(rows, 4096, seed=1).bfloat16(), fp8(1408, 4096, seed=2)
    bias = randn(1408, seed=3).bfloat16() if biased else None
    y = fp8_linear(x.cuda(), on_gpu(weight), None if bias is None else bias.cuda())
    assert_product(y.cpu(), meant(quantise_rows(x)), meant(weight), bias, ACCUMULATION)


@needs("linear")
def test_rows_are_quantised_as_on_a_cpu() -> None:
    x = (randn(64, 4096, seed=4) * randn(64, 1, seed=5).exp()).bfloat16()
    ours, theirs = quantise_rows(x.cuda()), quantise_rows(x)
    assert torch.equal(ours.scales.cpu(), theirs.scales)
    assert torch.equal(ours.values.cpu().float(), theirs.values.float())


@needs("experts")
@pytest.mark.parametrize("counts", [[3, 0, 17, 1], [0, 0, 0, 1], [128, 16, 0, 256]])
def test_grouped_linear(counts: list[int]) -> None:
    """Groups of any size, empty ones among them."""
    x, weight = randn(sum(counts), 4096, seed=6).bfloat16(), fp8(4, 2816, 4096, seed=7)
    ends = torch.tensor(counts).cumsum(0)
    y = fp8_grouped_linear(x.cuda(), on_gpu(weight), ends.int().cuda()).cpu()
    rows = meant(quantise_rows(x))
    for e, (count, end) in enumerate(zip(counts, ends.tolist())):
        group = slice(end - count, end)
        assert_product(y[group], rows[group], meant(weight)[e], accumulation=ACCUMULATION)


@needs("experts")
def test_grouped_linear_can_be_captured() -> None:
    x, weight = randn(24, 4096, seed=8).bfloat16().cuda(), on_gpu(fp8(4, 2816, 4096, seed=9))
    ends = torch.tensor([3, 3, 20, 24], dtype=torch.int32, device="cuda")
    expected = fp8_grouped_linear(x, weight, ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fp8_grouped_linear(x, weight, ends)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
