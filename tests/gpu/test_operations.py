"""FlashInfer's kernels against the reference in fp32, on inputs that are exact in bf16.

Tolerances count roundings to bf16, each of at most 2^-8 of the value rounded: one of the result, and those of what a
kernel keeps in bf16 on its way.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.kernels import AttentionMetadata, RoutingConfig, select
from specdec.kernels.reference import lowest_argmax

CUDA = torch.device("cuda")
EXACT = select(torch.device("cpu"), torch.float32, "reference")
ROUNDING = 2.0**-8


def randn(*shape: int, seed: int = 0) -> Tensor:
    """On the CPU, exact in bf16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_close(actual: Tensor, exact: Tensor, roundings: int, scale: Tensor | float = 0.0) -> None:
    """Off by so many roundings of a value of the result's size, or of `scale`."""
    size = torch.maximum(exact.abs(), torch.as_tensor(scale))
    worst = ((actual.float().cpu() - exact).abs() / (size + 1e-6)).max().item()
    assert worst <= roundings * ROUNDING * 1.01, f"{worst / ROUNDING:.2f} roundings"


def pages(query_lens: list[int], kv_lens: list[int], page_size: int) -> tuple[AttentionMetadata, int]:
    counts = [-(-length // page_size) for length in kv_lens]
    free = random.Random(0).sample(range(sum(counts) + 3), sum(counts))
    tables = [[free.pop() for _ in range(count)] for count in counts]
    return AttentionMetadata(query_lens, kv_lens, tables, page_size), sum(counts) + 3


SHAPES = {
    "verification": ([4] * 3, [4, 37, 1000]),
    "eight drafts": ([9] * 2, [9, 5000]),
    "decoding": ([1, 1], [1, 3000]),
    "prompts": ([300, 7], [300, 23]),
    "mixed": ([4, 200, 1], [20, 700, 17]),
}


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 64), (12, 1, 128), (96, 8, 128)])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(kernels: Any, shape: str, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int) -> None:
    query_lens, kv_lens = SHAPES[shape]
    meta, num_pages = pages(query_lens, kv_lens, page_size)
    cache = randn(num_pages, 2, page_size, num_kv_heads, head_dim, seed=1)
    q = randn(sum(query_lens), num_heads, head_dim, seed=2)
    exact = EXACT.paged_attention(q.float(), cache.float(), meta)
    # Probabilities are multiplied with values in bf16: a rounding of each, which add up to that of a mean of |values|.
    means = EXACT.paged_attention(q.float(), torch.stack([cache[:, 0], cache[:, 1].abs()], 1).float(), meta)
    assert_close(kernels.paged_attention(q.to(CUDA), cache.to(CUDA), meta), exact, 2, means)


def test_keys_are_appended_into_slots_of_any_order(kernels: Any) -> None:
    heads = randn(5, 6, 64, seed=1)
    _, k, v = heads.split([2, 2, 2], 1)
    slots, cache = torch.tensor([33, 2, 47, 0, 16]), randn(3, 2, 16, 2, 64)
    on_gpu = cache.to(CUDA)
    _, k_gpu, v_gpu = heads.to(CUDA).split([2, 2, 2], 1)
    kernels.append_kv(k_gpu, v_gpu, on_gpu, slots.to(CUDA))
    EXACT.append_kv(k, v, cache, slots)
    assert torch.equal(on_gpu.cpu(), cache)


@pytest.mark.parametrize("hidden", [256, 4096, 5120])
def test_norms(kernels: Any, hidden: int) -> None:
    x, residual, weight = randn(6, hidden), randn(6, hidden, seed=1), randn(hidden, seed=2)
    exact = EXACT.rms_norm(x.float(), weight.float(), 1e-5)
    assert_close(kernels.rms_norm(x.to(CUDA), weight.to(CUDA), 1e-5), exact, 2)
    normed, total = EXACT.add_rms_norm(x.float(), residual.float(), weight.float(), 1e-5)
    ours = kernels.add_rms_norm(x.to(CUDA), residual.to(CUDA), weight.to(CUDA), 1e-5)
    assert_close(ours[0], normed, 3)
    assert_close(ours[1], total, 1)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_norm_and_rope_of_heads_that_lie_among_others(kernels: Any, head_dim: int) -> None:
    heads, weight = randn(5, 6, head_dim), randn(head_dim, seed=1)
    q, k, _ = heads.to(CUDA).split([3, 2, 1], 1)
    exact_q, exact_k, _ = heads.float().split([3, 2, 1], 1)
    assert_close(kernels.rms_norm(q, weight.to(CUDA), 1e-5), EXACT.rms_norm(exact_q, weight.float(), 1e-5), 2)
    positions, half = torch.tensor([0, 9, 3, 3, 11]), head_dim // 4
    angles = torch.arange(12.0)[:, None] * 1e6 ** -(torch.arange(half) / half)
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    kernels.rope_(q, k, positions.to(CUDA), cos_sin.to(CUDA))
    EXACT.rope_(exact_q, exact_k, positions, cos_sin)
    assert_close(q, exact_q, 1)
    assert_close(k, exact_k, 1)


def test_activation_and_dense_mlp(kernels: Any) -> None:
    x, gate_up, down = randn(5, 256), randn(1024, 256, seed=1) / 16, randn(256, 512, seed=2) / 16
    assert_close(kernels.silu_and_mul(randn(5, 96).to(CUDA)), EXACT.silu_and_mul(randn(5, 96).float()), 1)
    exact = EXACT.mlp(x.float(), gate_up.float(), down.float())
    ours = kernels.mlp(x.to(CUDA), kernels.pack_gate_up(gate_up.to(CUDA)), down.to(CUDA))
    assert_close(ours, exact, 4, exact.abs().max())


@pytest.mark.parametrize(("num_experts", "hidden", "width"), [(16, 256, 48), (128, 512, 128), (160, 512, 128)])
@pytest.mark.parametrize("kind", ["chosen", "grouped"])
def test_experts(kernels: Any, kind: str, num_experts: int, hidden: int, width: int) -> None:
    from specdec.kernels.flashinfer.experts import GroupedExperts

    experts = kernels.experts if kind == "chosen" else GroupedExperts()
    x = randn(37, hidden)
    gate_up = randn(num_experts, 2 * width, hidden, seed=1) * hidden**-0.5
    down = randn(num_experts, hidden, width, seed=2) * width**-0.5
    logits, routing = randn(37, num_experts, seed=3).float(), RoutingConfig(8, 1, 1, True, 2.5)
    ids, weights = EXACT.route(logits, torch.zeros(num_experts), routing)
    on_gpu = kernels.route(logits.to(CUDA), torch.zeros(num_experts, device=CUDA), routing)
    assert torch.equal(on_gpu[0].cpu(), ids)
    exact = EXACT.moe(x.float(), ids, weights, gate_up.float(), down.float())
    packed = experts.pack_gate_up(gate_up.to(CUDA)), down.to(CUDA)
    first, again = (experts(x.to(CUDA), *on_gpu, *packed) for _ in range(2))
    assert_close(first, exact, 4, exact.abs().max())
    assert torch.equal(first, again)  # sums in a fixed order


def test_head_argmax_takes_the_lowest_of_equals_and_sees_what_is_not_finite(kernels: Any) -> None:
    x, head = randn(4, 64).to(CUDA), randn(5000, 64, seed=1).to(CUDA)
    head[4000] = head[17]
    x[2] = float("nan")
    found = kernels.head_argmax(x, head).tolist()
    expected = lowest_argmax(torch.nn.functional.linear(x, head)).tolist()
    assert found[2] == -1
    assert found[:2] + found[3:] == expected[:2] + expected[3:]
