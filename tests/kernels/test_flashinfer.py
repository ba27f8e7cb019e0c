"""FlashInfer's kernels behind our interface, one operation at a time, against the reference in float64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("flashinfer", reason="FlashInfer is not installed: make test-flashinfer")

from specdec.kernels import AttentionMetadata, RoutingConfig, select
from specdec.kernels.flashinfer.backend import FlashInferKernels
from specdec.kernels.flashinfer.experts import FusedExperts, GroupedExperts, experts_for
from support import flashinfer_fakes
from support.flashinfer_fakes import FakeDevice

CPU = torch.device("cpu")
EXACT = select(CPU, torch.float64, "reference")
# Half a unit in the last of the seven places that bf16 has after the point: one rounding, relative to the result.
ROUNDING = 2.0**-8


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return flashinfer_fakes.install(monkeypatch)


@pytest.fixture
def kernels(fake: FakeDevice) -> FlashInferKernels:
    return FlashInferKernels(CPU, FusedExperts())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_close(actual: Tensor, exact: Tensor, roundings: int, scale: Tensor | float = 0.0) -> None:
    """Off by so many roundings of a value of the result's size, or of `scale`."""
    size = torch.maximum(exact.abs(), torch.as_tensor(scale))
    worst = ((actual.double() - exact).abs() / (size + 1e-6)).max().item()
    assert worst <= roundings * ROUNDING * 1.01, f"{worst / ROUNDING:.2f} roundings"


def metadata(query_lens: list[int], kv_lens: list[int], page_size: int, seed: int = 0) -> tuple[AttentionMetadata, int]:
    """Pages in random order; -> and how many there are."""
    counts = [-(-length // page_size) for length in kv_lens]
    pages = list(range(sum(counts) + 3))
    random.Random(seed).shuffle(pages)
    tables = [[pages.pop() for _ in range(count)] for count in counts]
    return AttentionMetadata(query_lens, kv_lens, tables, page_size), sum(counts) + 3


SHAPES = {
    "verification": ([4, 4, 4], [4, 37, 16]),
    "decoding": ([1, 1], [1, 33]),
    "prompts": ([40, 7], [40, 23]),
    "mixed": ([4, 30, 1], [20, 30, 17]),
}


@pytest.mark.parametrize("page_size", [1, 16, 20])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (12, 1), (96, 8)], ids=["small", "group 12", "GLM"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(kernels: FlashInferKernels, shape: str, num_heads: int, num_kv_heads: int, page_size: int) -> None:
    query_lens, kv_lens = SHAPES[shape]
    meta, num_pages = metadata(query_lens, kv_lens, page_size)
    cache = randn(num_pages, 2, page_size, num_kv_heads, 128, seed=1)
    q = randn(sum(query_lens), num_heads, 128, seed=2)
    # Sums are in fp32; one rounding, at the end.
    assert_close(kernels.paged_attention(q, cache, meta), EXACT.paged_attention(q.double(), cache.double(), meta), 1)


def test_keys_are_appended_into_slots_of_any_order(kernels: FlashInferKernels) -> None:
    heads = randn(5, 6, 64, seed=1)  # keys and values as they lie among the queries
    _, k, v = heads.split([2, 2, 2], 1)
    slots = torch.tensor([33, 2, 47, 0, 16])
    cache, expected = randn(3, 2, 16, 2, 64), randn(3, 2, 16, 2, 64)
    kernels.append_kv(k, v, cache, slots)
    EXACT.append_kv(k, v, expected, slots)
    assert torch.equal(cache, expected)


def test_norms(kernels: FlashInferKernels) -> None:
    x, residual, weight = randn(6, 96), randn(6, 96, seed=1), randn(96, seed=2)
    assert_close(kernels.rms_norm(x, weight, 1e-5), EXACT.rms_norm(x.double(), weight.double(), 1e-5), 1)
    normed, total = EXACT.add_rms_norm(x.double(), residual.double(), weight.double(), 1e-5)
    ours = kernels.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
    assert_close(ours[0], normed, 1)
    assert_close(ours[1], total, 1)


def test_norms_of_heads_that_lie_among_others(kernels: FlashInferKernels) -> None:
    heads, weight = randn(5, 6, 64), randn(64, seed=1)
    q = heads[:, 1:4]
    assert_close(kernels.rms_norm(q, weight, 1e-5), EXACT.rms_norm(q.double(), weight.double(), 1e-5), 1)


def test_rope_rotates_half_of_each_head_in_place(kernels: FlashInferKernels) -> None:
    heads = randn(5, 6, 64)
    q, k, _ = heads.split([3, 2, 1], 1)
    exact_q, exact_k = q.double(), k.double()
    positions = torch.tensor([0, 9, 3, 3, 11])
    angles = torch.arange(12.0)[:, None] * 100.0 ** -(torch.arange(16) / 16)
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    kernels.rope_(q, k, positions, cos_sin)
    EXACT.rope_(exact_q, exact_k, positions, cos_sin)
    assert_close(q, exact_q, 1)
    assert_close(k, exact_k, 1)


def test_activation_and_dense_mlp(kernels: FlashInferKernels) -> None:
    x, gate_up, down = randn(5, 32), randn(2 * 48, 32, seed=1) * 32**-0.5, randn(32, 48, seed=2) * 48**-0.5
    both = randn(5, 96)
    assert_close(kernels.silu_and_mul(both), EXACT.silu_and_mul(both.double()), 1)
    exact = EXACT.mlp(x.double(), gate_up.double(), down.double())
    # Two roundings on the way, each at most that of a product of the row's size; one at the end.
    assert_close(kernels.mlp(x, kernels.pack_gate_up(gate_up), down), exact, 4, exact.abs().max())


@pytest.mark.parametrize("num_experts", [8, 128, 160])
@pytest.mark.parametrize("experts", [FusedExperts(), GroupedExperts()], ids=["fused", "grouped"])
def test_experts(fake: FakeDevice, experts: FusedExperts | GroupedExperts, num_experts: int) -> None:
    kernels = FlashInferKernels(CPU, experts)
    x, k = randn(7, 32), min(8, num_experts - 1)
    gate_up, down = randn(num_experts, 2 * 24, 32, seed=1) * 32**-0.5, randn(num_experts, 32, 24, seed=2) * 24**-0.5
    logits = randn(7, num_experts, seed=3).float()
    ids, weights = kernels.route(logits, torch.zeros(num_experts), RoutingConfig(k, 1, 1, True, 2.5))
    packed = kernels.pack_gate_up(gate_up), kernels.pack(down)
    exact = EXACT.moe(x.double(), ids, weights, gate_up.double(), down.double())
    # Roundings of the products and of each expert's output, all of at most the largest output's size, and the last one.
    assert_close(kernels.moe(x, ids, weights, *packed), exact, 4, exact.abs().max())


def test_which_gpu_has_fused_experts() -> None:
    fused = [(8, 9), (9, 0), (10, 0), (12, 0)]
    assert all(isinstance(experts_for(capability), FusedExperts) for capability in fused)
    assert isinstance(experts_for((8, 0)), GroupedExperts)
    assert isinstance(experts_for((8, 6)), GroupedExperts)


def test_nothing_in_the_operations_waits(fake: FakeDevice) -> None:
    from support.flashinfer_fakes.device import on_device

    for experts in (FusedExperts(), GroupedExperts()):
        kernels = FlashInferKernels(CPU, experts)
        x, weight = on_device(randn(4, 64)), on_device(randn(64, seed=1))
        meta, num_pages = metadata([2, 2], [20, 3], 16)
        cache = on_device(randn(num_pages, 2, 16, 1, 64))
        with fake.waiting() as waits:
            kernels.rms_norm(x, weight, 1e-5)
            kernels.append_kv(x.view(4, 1, 64), x.view(4, 1, 64), cache, on_device(torch.tensor(meta.slots)))
            kernels.paged_attention(x.view(4, 1, 64), cache, meta)
            routing = RoutingConfig(2, 2, 1, True, 1.0)
            ids, weights = kernels.route(on_device(randn(4, 8).float()), on_device(torch.zeros(8)), routing)
            gate_up, down = on_device(randn(8, 32, 64)), on_device(randn(8, 64, 16))
            kernels.moe(x, ids, weights, gate_up, down)
            kernels.head_argmax(x, on_device(randn(9, 64)))
        assert waits == []
    with fake.waiting() as waits:
        EXACT.moe(x.double(), ids, weights, gate_up.double(), down.double())
    assert waits  # it can tell
