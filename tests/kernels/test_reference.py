"""The reference kernels against independent formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from specdec.kernels import AttentionMetadata, RoutingConfig, select

CPU = torch.device("cpu")
KERNELS = select(CPU, torch.float64, "reference")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_select_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="kernels = 'cuda' is unknown: choose one of auto, reference, cpu"):
        select(CPU, torch.float32, "cuda")


def test_rms_norm_multiplies_by_the_weight_itself() -> None:
    x, w = randn(5, 7), randn(7, seed=1)
    expected = torch.stack([row / math.sqrt((row * row).sum() / 7 + 1e-5) * w for row in x])
    torch.testing.assert_close(KERNELS.rms_norm(x, w, 1e-5), expected)
    normed, total = KERNELS.add_rms_norm(x, x, w, 1e-5)
    torch.testing.assert_close(total, 2 * x)
    torch.testing.assert_close(normed, KERNELS.rms_norm(2 * x, w, 1e-5))


def test_rope_rotates_half_split_pairs_and_passes_the_rest() -> None:
    rotary, dim = 6, 10
    positions = torch.tensor([0, 3, 11])
    q, k = randn(3, 2, dim), randn(3, 1, dim, seed=1)
    inv_freq = 100.0 ** -(torch.arange(3, dtype=torch.float64) / 3)
    angles = torch.arange(12)[:, None] * inv_freq
    expected = q.clone()
    for t, position in enumerate(positions.tolist()):
        for i in range(3):  # dims i and i + 3 are one complex number
            z = torch.complex(q[t, :, i], q[t, :, i + 3]) * torch.polar(
                torch.ones((), dtype=torch.float64), (position * inv_freq[i])
            )
            expected[t, :, i], expected[t, :, i + 3] = z.real, z.imag
    k_before = k.clone()
    KERNELS.rope_(q, k, positions, torch.cat([angles.cos(), angles.sin()], -1))
    torch.testing.assert_close(q, expected)
    torch.testing.assert_close(k[0], k_before[0])  # position 0
    assert torch.equal(k[..., rotary:], k_before[..., rotary:])


def routing(k: int, n_group: int = 1, topk_group: int = 1, norm: bool = True, scale: float = 1.0) -> RoutingConfig:
    return RoutingConfig(k, n_group, topk_group, norm, scale)


def test_route_chooses_with_the_bias_and_weighs_without_it() -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 5.0, 0.0])
    ids, weights = KERNELS.route(logits, bias, routing(2, scale=2.5))
    assert ids.tolist() == [[2, 0]]
    s = logits.sigmoid()[0]
    torch.testing.assert_close(weights[0], 2.5 * s[[2, 0]] / (s[2] + s[0]))
    _, unnormed = KERNELS.route(logits, bias, routing(2, norm=False))
    torch.testing.assert_close(unnormed[0], s[[2, 0]])


def test_route_takes_the_lowest_id_among_equals() -> None:
    ids, _ = KERNELS.route(torch.zeros(3, 160), torch.zeros(160), routing(8))
    assert ids.tolist() == [list(range(8))] * 3


def test_route_keeps_the_groups_with_the_best_two() -> None:
    # group 0 has the single best expert, group 1 the best pair
    logits = torch.tensor([[3.0, -9.0, -9.0, 1.0, 1.1, -9.0]])
    ids, _ = KERNELS.route(logits, torch.zeros(6), routing(2, n_group=2, topk_group=1))
    assert sorted(ids[0].tolist()) == [3, 4]


def test_moe_equals_a_loop_over_tokens() -> None:
    x, gate_up, down = randn(9, 6), randn(4, 10, 6, seed=1), randn(4, 6, 5, seed=2)
    ids = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(t))[:2] for t in range(9)])
    weights = randn(9, 2, seed=3).abs()
    expected = torch.zeros_like(x)
    for t in range(9):
        for e, w in zip(ids[t].tolist(), weights[t]):
            h = gate_up[e] @ x[t]
            expected[t] += w * (down[e] @ (torch.nn.functional.silu(h[:5]) * h[5:]))
    torch.testing.assert_close(KERNELS.moe(x, ids, weights, gate_up, down), expected)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_paged_attention_equals_dense_causal_attention(page_size: int) -> None:
    """Ragged queries, GQA, shuffled pages; slots that hold nothing are NaN and must not matter."""
    heads, kv_heads, dim = 6, 2, 8
    kv_lens, query_lens = [1, 7, 40, 19], [1, 3, 40, 1]
    num_pages = sum(-(-n // page_size) for n in kv_lens) + 2
    free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(page_size)).tolist()
    cache = torch.full((num_pages, 2, page_size, kv_heads, dim), float("nan"), dtype=torch.float64)
    queries, expected, tables, last_slots = [], [], [], []
    for b, (kv_len, query_len) in enumerate(zip(kv_lens, query_lens)):
        table = [free.pop() for _ in range(-(-kv_len // page_size))]
        k, v = randn(kv_len, kv_heads, dim, seed=10 + b), randn(kv_len, kv_heads, dim, seed=20 + b)
        slots = torch.tensor([table[i // page_size] * page_size + i % page_size for i in range(kv_len)])
        KERNELS.append_kv(k, v, cache, slots)
        q = randn(query_len, heads, dim, seed=30 + b)
        for i in range(query_len):
            seen = kv_len - query_len + i + 1
            for h in range(heads):
                scores = (k[:seen, h // 3] @ q[i, h]) / math.sqrt(dim)
                expected.append(scores.softmax(0) @ v[:seen, h // 3])
        queries.append(q)
        tables.append([*table, 0, 0])  # a table may be longer than needed
        last_slots.append(slots[-query_len:])
    metadata = AttentionMetadata(query_lens, kv_lens, tables, page_size)
    assert metadata.slots == torch.cat(last_slots).tolist()
    out = KERNELS.paged_attention(torch.cat(queries), cache, metadata)
    torch.testing.assert_close(out, torch.stack(expected).view_as(out))


def test_bf16_rounds_where_glm4_moe_does() -> None:
    """Reductions and softmax in fp32; the normalised value is rounded before the weight."""
    kernels = select(CPU, torch.bfloat16, "reference")
    x, w = randn(6, 300).bfloat16(), randn(300, seed=1).bfloat16()
    exact = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(kernels.rms_norm(x, w, 1e-5), exact.bfloat16() * w)

    q = (30 * randn(1, 2, 16, seed=2)).bfloat16()  # scores near 100, where bf16 has steps of 0.5
    k, v = randn(40, 2, 16, seed=3).bfloat16(), randn(40, 2, 16, seed=4).bfloat16()
    cache = torch.zeros(1, 2, 40, 2, 16, dtype=torch.bfloat16)
    kernels.append_kv(k, v, cache, torch.arange(40))
    out = kernels.paged_attention(q, cache, AttentionMetadata([1], [40], [[0]], 40))
    scores = torch.einsum("hd,shd->hs", q[0].double(), k.double()) / 4
    expected = torch.einsum("hs,shd->hd", scores.softmax(-1), v.double())
    torch.testing.assert_close(out[0].double(), expected, rtol=2**-8, atol=2**-8)
