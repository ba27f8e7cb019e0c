"""What FlashInfer compiles, in torch: the maths of its CUDA kernels, and checks that these leave out.

Intermediate results are rounded to bf16 where the CUDA kernels round: norms, RoPE and activation once, at their end.
What those compute in fp32 is in float64 here, so that no result depends on how a CPU rounds (see `products`).
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.flashinfer_fakes.device import FakeDevice, OnDevice, launch
from support.flashinfer_fakes.products import product

NON_CAUSAL, CAUSAL = 0, 1
HEAD_DIMS = (64, 128, 256)


def install(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    import flashinfer.activation
    import flashinfer.decode
    import flashinfer.norm
    import flashinfer.page
    import flashinfer.prefill
    import flashinfer.rope

    import specdec.kernels.flashinfer.experts

    for module in (flashinfer.decode, flashinfer.prefill):
        monkeypatch.setattr(
            module, "get_batch_prefill_module", lambda backend, *args: attention_module(fake, backend, *args)
        )
    monkeypatch.setattr(flashinfer.decode, "get_batch_decode_module", no_cuda_core_decoding)
    launched = functools.partial(launch, fake)
    monkeypatch.setattr(
        flashinfer.page, "get_page_module", lambda: SimpleNamespace(append_paged_kv_cache=launched(append))
    )
    monkeypatch.setattr(
        flashinfer.rope, "get_rope_module", lambda: SimpleNamespace(apply_rope_pos_ids_cos_sin_cache=launched(rope))
    )
    norms = SimpleNamespace(rmsnorm=launched(rmsnorm), fused_add_rmsnorm=launched(fused_add_rmsnorm))
    monkeypatch.setattr(flashinfer.norm, "get_norm_module", lambda: norms)
    monkeypatch.setattr(flashinfer.norm, "_use_cuda_norm", lambda device: True)
    activations = {"silu": SimpleNamespace(silu_and_mul=launched(silu_and_mul))}
    monkeypatch.setattr(flashinfer.activation, "get_act_and_mul_module", activations.__getitem__)
    real = inspect.signature(specdec.kernels.flashinfer.experts.cutlass_fused_moe)
    monkeypatch.setattr(
        specdec.kernels.flashinfer.experts, "cutlass_fused_moe", functools.partial(fused_moe, launched, real)
    )


@dataclass(frozen=True)
class Plan:
    """What `plan` leaves in the wrapper's integer workspace (here: as an attribute of it)."""

    qo_indptr: list[int]
    kv_indptr: list[int]
    kv_lens: list[int]
    num_heads: int
    num_kv_heads: int
    page_size: int
    graph: bool
    at: int


def no_cuda_core_decoding(*_: Any) -> None:
    raise AssertionError("kernels without tensor cores, which lack GLM-4.5's 12 query heads per key head")


def attention_module(fake: FakeDevice, backend: str, q_dtype: Any, kv_dtype: Any, o_dtype: Any, *rest: Any) -> Any:
    """fa2, the only backend that keeps to the plan's q_len_per_req and split."""
    assert backend == "fa2"
    assert {q_dtype, kv_dtype, o_dtype} == {torch.bfloat16}, f"kernels for {q_dtype}, {kv_dtype}, {o_dtype}"
    index_dtype, head_dim, head_dim_vo, *_ = rest
    assert index_dtype == torch.int32
    assert head_dim == head_dim_vo
    assert head_dim in HEAD_DIMS

    def plan(
        floats: Tensor, ints: Tensor, pinned_ints: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, kv_lens: Tensor,
        num_rows: int, batch_size: int, num_heads: int, num_kv_heads: int, page_size: int, graph: bool, *_: Any,
    ) -> list[int]:  # fmt: skip
        assert fake.capturing is None, "a plan in a capture"
        for name, x in (("qo_indptr", qo_indptr), ("kv_indptr", kv_indptr), ("kv_lens", kv_lens)):
            assert x.dtype == torch.int32, f"{name} is {x.dtype}"
            assert not isinstance(x, OnDevice), f"{name} is on the device"
        assert num_heads % num_kv_heads == 0
        before = getattr(ints, "plan", None)
        assert before is None or before.at <= fake.done, "planned before the last plan was copied to the device"
        fake.clock += 1
        ints.plan = Plan(
            qo_indptr.tolist(), kv_indptr.tolist(), kv_lens.tolist(), num_heads, num_kv_heads, page_size, graph,
            fake.clock,
        )  # fmt: skip
        return [fake.clock if not graph else 0]

    def paged_run(
        floats: Tensor, ints: Tensor, plan_info: list[int], q: Tensor, k: Tensor, v: Tensor, qo_indptr: Tensor,
        kv_indptr: Tensor, kv_indices: Tensor, last_page_len: Tensor, o: Tensor, lse: Any, mask_mode: int, layout: int,
        window_left: int, enable_pdl: bool, *more: Any, **other: Any,
    ) -> None:  # fmt: skip
        assert (lse, layout, window_left) == (None, 0, -1)
        sm_scale = more[7]
        launch(fake, attend)(
            ints, plan_info, q, k, v, qo_indptr, kv_indptr, kv_indices, last_page_len, o, mask_mode, sm_scale
        )

    return SimpleNamespace(plan=plan, paged_run=paged_run)


def attend(
    ints: Tensor, plan_info: list[int], q: Tensor, k: Tensor, v: Tensor, qo_indptr: Tensor,
    kv_indptr: Tensor, kv_indices: Tensor, last_page_len: Tensor, o: Tensor, mask_mode: int, sm_scale: float,
) -> None:  # fmt: skip
    plan: Plan = ints.plan
    assert plan.graph or plan_info == [plan.at], "run with another plan's numbers"
    starts, pages, last = qo_indptr.tolist(), kv_indptr.tolist(), last_page_len.tolist()
    assert starts == plan.qo_indptr, "query lengths are not those planned for"
    assert pages == plan.kv_indptr, "numbers of pages are not those planned for"
    assert (q.shape[1], k.shape[2], k.shape[1]) == (plan.num_heads, plan.num_kv_heads, plan.page_size)
    assert q.shape[0] == starts[-1]
    assert k.dtype == v.dtype == q.dtype == torch.bfloat16
    assert k.stride() == v.stride()
    group = q.shape[1] // k.shape[2]
    for b, (first, end) in enumerate(pairwise(starts)):
        table = kv_indices[pages[b] : pages[b + 1]].long()
        assert 0 <= int(table.min()) <= int(table.max()) < len(k), "a page that is not there"
        assert 1 <= last[b] <= plan.page_size
        num_keys, num_queries = (len(table) - 1) * plan.page_size + last[b], end - first
        assert num_keys >= num_queries
        assert mask_mode == CAUSAL or num_queries == 1
        keys, values = (
            x[table].flatten(0, 1)[:num_keys].double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v)
        )  # [Hq, S, D]
        scores = q[first:end].double().transpose(0, 1) @ keys.transpose(1, 2) * sm_scale  # [Hq, Q, S]
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1)
        probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        o[first:end] = (probs @ values).transpose(0, 1).to(o.dtype)


def append(
    key: Tensor, value: Tensor, batch_indices: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor,
    kv_indices: Tensor, kv_indptr: Tensor, last_page_len: Tensor, layout: int,
) -> None:  # fmt: skip
    assert layout == 0
    assert key.dtype == value.dtype == k_cache.dtype == torch.bfloat16, f"{key.dtype} into a {k_cache.dtype} cache"
    assert {x.dtype for x in (batch_indices, positions, kv_indices, kv_indptr, last_page_len)} == {torch.int32}
    assert len(batch_indices) == len(positions) == len(key)
    page_size = k_cache.shape[1]
    for row, (b, at) in enumerate(zip(batch_indices.tolist(), positions.tolist())):
        assert 0 <= b < len(last_page_len), f"sequence {b}"
        first, end = kv_indptr[b].item(), kv_indptr[b + 1].item()
        assert 0 <= at < (end - first - 1) * page_size + last_page_len[b].item(), f"position {at}"
        page = kv_indices[first + at // page_size]
        k_cache[page, at % page_size] = key[row]
        v_cache[page, at % page_size] = value[row]


def rope(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos_sin: Tensor, positions: Tensor, interleave: bool
) -> None:
    assert not interleave
    assert q.shape[-1] in HEAD_DIMS
    assert q.dtype == k.dtype == torch.bfloat16
    assert positions.dtype in (torch.int32, torch.int64)
    assert 0 <= int(positions.min()) <= int(positions.max()) < len(cos_sin), "a position past the table"
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions.long()].double().unsqueeze(1).chunk(2, -1)
    for x, out in ((q, q_out), (k, k_out)):
        assert x.data_ptr() == out.data_ptr()
        x1, x2 = x[..., :half].double(), x[..., half : 2 * half].double()
        out[..., : 2 * half] = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(out.dtype)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    assert weight.dtype == torch.bfloat16, f"a weight of {weight.dtype}"
    assert x.shape[-1] == len(weight)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def rmsnorm(out: Tensor, x: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:
    assert x.dtype == out.dtype == torch.bfloat16
    assert x.dim() in (2, 3)
    out.copy_(_normed(x.double(), weight, eps))


def fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:
    assert x.dtype == residual.dtype == torch.bfloat16
    assert x.dim() == 2
    assert x.data_ptr() != residual.data_ptr()
    total = x.double() + residual.double()
    residual.copy_(total)
    x.copy_(_normed(total, weight, eps))


def silu_and_mul(out: Tensor, x: Tensor, enable_pdl: bool) -> None:
    assert x.is_contiguous()
    gate, up = x.double().chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def fused_moe(launched: Any, signature: inspect.Signature, *args: Any, **kwargs: Any) -> list[Tensor]:
    """cutlass_fused_moe in bf16: fc1 has the up rows first."""
    call = signature.bind(*args, **kwargs)
    call.apply_defaults()
    a = SimpleNamespace(**call.arguments)
    assert (a.quant_scales, a.output_dtype, a.tp_size, a.ep_size) == ([], torch.bfloat16, 1, 1)
    assert not a.use_fused_finalize, "a sum in no fixed order"
    assert a.output is not None
    launched(moe)(
        a.input, a.token_selected_experts, a.token_final_scales, a.fc1_expert_weights, a.fc2_expert_weights, a.output
    )
    return [a.output]


def moe(x: Tensor, ids: Tensor, scales: Tensor, fc1: Tensor, fc2: Tensor, out: Tensor) -> None:
    assert x.dtype == fc1.dtype == fc2.dtype == out.dtype == torch.bfloat16
    assert (ids.dtype, scales.dtype) == (torch.int32, torch.float32)
    assert all(t.is_contiguous() for t in (x, ids, scales, fc1, fc2, out))
    total = torch.zeros(x.shape, dtype=torch.float64)
    for e in ids.unique().tolist():
        rows, choices = (ids == e).nonzero(as_tuple=True)
        up, gate = product(x[rows], fc1[e]).chunk(2, -1)
        hidden = (torch.nn.functional.silu(gate) * up).to(x.dtype)
        routed = product(hidden, fc2[e]).to(x.dtype)
        total[rows] += routed.double() * scales[rows, choices].unsqueeze(-1)
    out.copy_(total)
