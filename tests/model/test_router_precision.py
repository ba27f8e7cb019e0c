"""Correction biases near 7 with a small spread: kept in bf16 they would decide the routing."""

from __future__ import annotations

import torch

from specdec.kernels import select
from specdec.model.config import parse_config
from specdec.model.layers import Router
from support.fakes import tiny_config

NUM_TOKENS, NUM_EXPERTS, TOP_K = 4000, 128, 8


def test_router_equals_the_fp32_reference_under_large_biases() -> None:
    """The model runs in bf16; weight, bias and router matmul stay in fp32."""
    config = parse_config(tiny_config(n_routed_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, hidden_size=64))
    router = Router(config, select(torch.device("cpu"), torch.bfloat16, "reference")).to_empty(device="cpu")
    assert router.weight.dtype == router.e_score_correction_bias.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(NUM_EXPERTS, 64, generator=generator) / 8
    bias = 7 + 0.1 * torch.randn(NUM_EXPERTS, generator=generator)
    x = torch.randn(NUM_TOKENS, 64, generator=generator).bfloat16()
    router.weight.copy_(weight)
    router.e_score_correction_bias.copy_(bias)
    router.pack()

    logits = router.kernels.linear(x.float(), router.packed["weight"])
    chosen = router.kernels.route(logits, router.e_score_correction_bias, config.routing)[0].sort(-1).values
    choice = (x.double() @ weight.double().T).sigmoid() + bias.double()
    ordered = choice.sort(-1, descending=True)
    margins = ordered.values[:, TOP_K - 1] - ordered.values[:, TOP_K]
    expected = ordered.indices[:, :TOP_K].sort(-1).values
    clear = margins > 2e-6
    unclear = int((~clear).sum())
    assert unclear < NUM_TOKENS // 100, f"{unclear} of {NUM_TOKENS} tokens have no clear margin"
    assert torch.equal(chosen[clear], expected[clear])

    in_bf16 = (x @ weight.bfloat16().T).sigmoid() + bias.bfloat16()
    differs = (in_bf16.topk(TOP_K).indices.sort(-1).values != expected).any(-1).double().mean()
    assert differs > 0.5, f"the test has no power: a router in bf16 differs for only {differs:.0%} of the tokens"
