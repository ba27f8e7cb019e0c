"""The C++ kernels: right against the reference, and a row's bits independent of its neighbours."""

from __future__ import annotations

import platform
import random

import pytest
import torch
from torch import Tensor

from specdec.kernels import AttentionMetadata, RoutingConfig, select
from specdec.kernels.cpu import CpuKernels
from support.fakes import WHY_NO_COMPILER, randn

if WHY_NO_COMPILER:
    pytest.skip(WHY_NO_COMPILER, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_empty", "num_threads")

CPU = torch.device("cpu")
EXACT = select(CPU, torch.float64, "reference")
MAX_ROWS = 17
# AVX-512 where the machine has it, AVX2 + FMA, plain loops: all of one result, to the bit
ARCHITECTURES = ["native", *(["haswell", "x86-64"] if platform.machine() == "x86_64" else [])]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def kernels(architecture: str, request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels(request.param, architecture=architecture)


@pytest.fixture(scope="module")
def fp32(architecture: str) -> CpuKernels:
    return CpuKernels(torch.float32, architecture=architecture)


@pytest.mark.slow
@pytest.mark.parametrize(("out", "size_in"), [(1, 1), (16, 16), (173, 96), (96, 173), (300, 1100), (64, 20)])
def test_linear_is_right_and_row_invariant(kernels: CpuKernels, out: int, size_in: int) -> None:
    weight, bias, x = randn(out, size_in, seed=1).to(kernels.dtype), randn(out, seed=2), randn(130, size_in)
    packed = kernels.pack(weight)
    whole = kernels.linear(x, packed, bias)
    expected = EXACT.linear(x.double(), weight.double(), bias.double())
    bound = 1e-5 * (x.abs().double() @ weight.abs().double().T) + 1e-6
    assert ((whole - expected).abs() <= bound).all()
    for rows in [*range(1, MAX_ROWS + 1), 23, 24, 25, 64]:
        assert torch.equal(kernels.linear(x[:rows], packed, bias), whole[:rows]), rows
        assert torch.equal(kernels.linear(x[3 : 3 + rows], packed, bias), whole[3 : 3 + rows]), rows


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "width", "experts", "k"), [(96, 40, 8, 2), (32, 24, 5, 3), (20, 7, 16, 1)])
def test_moe_is_right_and_row_invariant(kernels: CpuKernels, hidden: int, width: int, experts: int, k: int) -> None:
    gate_up, down = (
        (randn(*s, seed=i) * s[-1] ** -0.5).to(kernels.dtype)
        for i, s in ((1, (experts, 2 * width, hidden)), (2, (experts, hidden, width)))
    )
    x, weights = randn(40, hidden), randn(40, k, seed=3).abs()
    ids = torch.stack([torch.randperm(experts, generator=torch.Generator().manual_seed(t))[:k] for t in range(40)])
    packed = kernels.pack_gate_up(gate_up), kernels.pack(down)
    whole = kernels.moe(x, ids, weights, *packed)
    expected = EXACT.moe(x.double(), ids, weights.double(), gate_up.double(), down.double())
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-5)
    for rows in range(1, MAX_ROWS + 1):
        assert torch.equal(kernels.moe(x[:rows], ids[:rows], weights[:rows], *packed), whole[:rows]), rows
    permuted = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernels.moe(x[permuted], ids[permuted], weights[permuted], *packed), whole[permuted])


@pytest.mark.parametrize("size", [1, 7, 16, 32, 96, 173])
def test_elementwise_operations_are_right_and_row_invariant(fp32: CpuKernels, size: int) -> None:
    kernels = fp32
    x, y, w = randn(33, size), randn(33, size, seed=1), randn(size, seed=2)
    torch.testing.assert_close(
        kernels.rms_norm(x, w, 1e-5).double(), EXACT.rms_norm(x.double(), w.double(), 1e-5), rtol=1e-5, atol=1e-6
    )
    normed, total = kernels.add_rms_norm(x, y, w, 1e-5)
    assert torch.equal(total, x + y)
    assert torch.equal(normed, kernels.rms_norm(x + y, w, 1e-5))
    both = torch.cat([4 * x, y], 1)
    activated = kernels.silu_and_mul(both)
    torch.testing.assert_close(activated.double(), EXACT.silu_and_mul(both.double()), rtol=1e-5, atol=1e-6)
    for rows in range(1, MAX_ROWS + 1):
        assert torch.equal(kernels.rms_norm(x[:rows], w, 1e-5), kernels.rms_norm(x, w, 1e-5)[:rows])
        assert torch.equal(kernels.silu_and_mul(both[:rows]), activated[:rows])


def test_silu_is_right_far_out(fp32: CpuKernels) -> None:
    x = torch.tensor([-1e30, -200.0, -88.0, -87.3, -20.0, 0.0, 20.0, 88.0, 1e30])
    both = torch.cat([x, torch.ones(9)])[None]
    torch.testing.assert_close(fp32.silu_and_mul(both)[0], torch.nn.functional.silu(x), rtol=1e-5, atol=1e-30)
    assert torch.isnan(fp32.silu_and_mul(torch.tensor([[float("nan"), 1.0]]))).all()


@pytest.mark.parametrize(("dim", "rotary"), [(32, 32), (32, 16), (24, 6), (128, 64)])
def test_rope_is_right(fp32: CpuKernels, dim: int, rotary: int) -> None:
    positions = torch.tensor([0, 5, 63, 2])
    angles = torch.arange(64)[:, None] * 100.0 ** -(torch.arange(rotary // 2) * 2 / rotary)
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    qkv = randn(4, 7, dim)
    q, k = qkv[:, :4], qkv[:, 4:6]  # views with a row stride, as the model has them
    exact_q, exact_k, v = q.double().clone(), k.double().clone(), qkv[:, 6:].clone()
    EXACT.rope_(exact_q, exact_k, positions, cos_sin.double())
    fp32.rope_(q, k, positions, cos_sin)
    torch.testing.assert_close(q.double(), exact_q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(k.double(), exact_k, rtol=1e-5, atol=1e-6)
    assert torch.equal(qkv[:, 6:], v)


@pytest.mark.parametrize(
    ("experts", "k", "groups", "kept"), [(16, 2, 1, 1), (160, 8, 1, 1), (12, 3, 4, 2), (8, 2, 2, 1)]
)
def test_route_equals_the_reference(fp32: CpuKernels, experts: int, k: int, groups: int, kept: int) -> None:
    config = RoutingConfig(k, groups, kept, True, 2.5)
    logits, bias = randn(50, experts), 0.1 * randn(experts, seed=1)
    ids, weights = fp32.route(logits, bias, config)
    exact_ids, exact_weights = EXACT.route(logits.double(), bias.double(), config)
    assert torch.equal(ids, exact_ids)
    torch.testing.assert_close(weights.double(), exact_weights, rtol=1e-5, atol=1e-7)
    ties, _ = fp32.route(torch.zeros(3, experts), torch.zeros(experts), config)
    assert torch.equal(ties, EXACT.route(torch.zeros(3, experts), torch.zeros(experts), config)[0])


class PagedSequences:
    """Random keys and values of several sequences, in a cache whose other slots are NaN."""

    def __init__(
        self,
        kernels: CpuKernels,
        kv_lens: list[int],
        page_size: int,
        dtype: torch.dtype,
        kv_heads: int,
        dim: int,
        seed: int,
    ) -> None:
        self.kernels = kernels
        rng = random.Random(seed)
        counts = [-(-n // page_size) for n in kv_lens]
        pages = list(range(sum(counts) + 3))
        rng.shuffle(pages)
        self.kv_lens, self.page_size = kv_lens, page_size
        self.tables = [[pages.pop() for _ in range(c)] for c in counts]
        self.cache = torch.full((sum(counts) + 3, 2, page_size, kv_heads, dim), float("nan"), dtype=dtype)
        for s, n in enumerate(kv_lens):
            k, v = randn(n, kv_heads, dim, seed=100 + s), randn(n, kv_heads, dim, seed=200 + s)
            kernels.append_kv(k, v, self.cache, torch.tensor(self.slots(s, 0, n)))

    def slots(self, s: int, start: int, end: int) -> list[int]:
        return [self.tables[s][i // self.page_size] * self.page_size + i % self.page_size for i in range(start, end)]

    def attend(self, q: Tensor, parts: list[tuple[int, int, int]]) -> Tensor:
        """parts: (sequence, first query position, one after the last)."""
        tables = [self.tables[s] for s, _, _ in parts]
        metadata = AttentionMetadata([b - a for _, a, b in parts], [b for _, _, b in parts], tables, self.page_size)
        assert metadata.slots == [slot for s, a, b in parts for slot in self.slots(s, a, b)]
        return self.kernels.paged_attention(q, self.cache, metadata)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (12, 1, 128), (3, 3, 24), (2, 1, 300)])
def test_attention_is_right_and_row_invariant(
    fp32: CpuKernels, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    kv_lens = [1, 150, 64, 65, 33]
    outputs = []
    for page_size in (1, 5, 16):
        paged = PagedSequences(fp32, kv_lens, page_size, dtype, kv_heads, dim, seed=page_size)
        queries = [randn(n, heads, dim, seed=300 + s) for s, n in enumerate(kv_lens)]
        whole = [paged.attend(q, [(s, 0, n)]) for s, (q, n) in enumerate(zip(queries, kv_lens))]
        outputs.append(whole)
        rng = random.Random(page_size)
        for _ in range(25):  # ragged batches of arbitrary chunks
            parts = []
            for s in rng.sample(range(len(kv_lens)), rng.randint(1, len(kv_lens))):
                end = rng.randint(1, kv_lens[s])
                parts.append((s, rng.randint(max(0, end - MAX_ROWS), end - 1), end))
            out = paged.attend(torch.cat([queries[s][a:b] for s, a, b in parts]), parts)
            assert torch.equal(out, torch.cat([whole[s][a:b] for s, a, b in parts]))
        if page_size == 5:
            metadata = AttentionMetadata(kv_lens, kv_lens, paged.tables, page_size)
            expected = EXACT.paged_attention(torch.cat(queries).double(), paged.cache.double(), metadata)
            torch.testing.assert_close(torch.cat(whole).double(), expected, rtol=1e-4, atol=1e-5)
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other)), "page size must not matter"


def test_bf16_caches_round_to_nearest_even(fp32: CpuKernels) -> None:
    cache = torch.zeros(1, 2, 8, 1, 8, dtype=torch.bfloat16)
    k, v = randn(8, 1, 8), randn(8, 1, 8, seed=1) * 1e30
    k[0, 0, 0], k[1, 0, 0] = float("nan"), float("inf")
    fp32.append_kv(k, v, cache, torch.arange(8))
    assert torch.equal(cache[0, 0].nan_to_num(7), k.bfloat16().nan_to_num(7))
    assert torch.equal(cache[0, 1], v.bfloat16())


@pytest.mark.parametrize(("hidden", "width"), [(96, 40), (20, 7), (64, 64)])
def test_mlp_is_right_and_row_invariant(kernels: CpuKernels, hidden: int, width: int) -> None:
    gate_up, down = (
        (randn(*s, seed=i) * s[-1] ** -0.5).to(kernels.dtype)
        for i, s in ((1, (2 * width, hidden)), (2, (hidden, width)))
    )
    x = randn(40, hidden)
    packed = kernels.pack_gate_up(gate_up), kernels.pack(down)
    whole = kernels.mlp(x, *packed)
    expected = EXACT.mlp(x.double(), gate_up.double(), down.double())
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-5)
    for rows in range(1, MAX_ROWS + 1):
        assert torch.equal(kernels.mlp(x[:rows], *packed), whole[:rows]), rows


@pytest.mark.parametrize(("out", "size_in"), [(173, 96), (16, 300), (1, 1)])
def test_int8_is_exactly_the_quantised_weight(architecture: str, out: int, size_in: int) -> None:
    """scale * q with |q| <= 127, each weight off by at most half a step; an all-zero row stays zero."""
    kernels = CpuKernels(torch.int8, torch.float32, architecture)
    weight, x = randn(out, size_in, seed=1), randn(40, size_in)
    if out > 1:
        weight[0] = 0
    scale = weight.abs().amax(1, keepdim=True) / 127
    quantised = (weight / scale.clamp(min=1e-38)).round() * scale
    assert ((quantised - weight).abs() <= 0.5001 * scale).all()
    packed = kernels.pack(weight)
    assert packed.data.dtype == torch.int8
    whole = kernels.linear(x, packed)
    bound = 1e-5 * (x.abs().double() @ quantised.abs().double().T) + 1e-7
    assert ((whole - x.double() @ quantised.double().T).abs() <= bound).all()
    for rows in range(1, MAX_ROWS + 1):
        assert torch.equal(kernels.linear(x[:rows], packed), whole[:rows]), rows
    full = kernels.pack(weight, full_precision=True)
    assert full.data.dtype == torch.float32, "the router is never quantised"


@pytest.mark.parametrize("vocab_size", [1, 16, 173, 1100])
def test_head_argmax_is_the_lowest_best_id(kernels: CpuKernels, vocab_size: int) -> None:
    head, x = randn(vocab_size, 96, seed=1).to(kernels.dtype), randn(MAX_ROWS, 96)
    head[vocab_size // 2 :] = head[: vocab_size - vocab_size // 2].clone()  # every logit twice
    packed = kernels.pack(head)
    expected = kernels.linear(x, packed).argmax(-1)
    ids = kernels.head_argmax(x, packed)
    assert torch.equal(ids, expected)
    assert vocab_size == 1 or int(ids.max()) < (vocab_size + 1) // 2
    for rows in range(1, MAX_ROWS + 1):
        assert torch.equal(kernels.head_argmax(x[:rows], packed), ids[:rows]), rows
    for bad in (float("nan"), float("inf"), float("-inf")):
        broken = x.clone()
        broken[2, 5] = bad
        assert kernels.head_argmax(broken, packed).tolist() == [
            -1 if r == 2 else i for r, i in enumerate(expected.tolist())
        ]


def test_results_do_not_depend_on_the_instruction_set() -> None:
    """One operation of each kind, to the bit."""
    x, weight = randn(30, 173), randn(96, 173, seed=1).bfloat16()
    outputs = []
    for name in ARCHITECTURES:
        kernels = CpuKernels(torch.bfloat16, architecture=name)
        paged = PagedSequences(kernels, [100, 30], 5, torch.bfloat16, 2, 24, seed=0)
        attended = paged.attend(randn(13, 4, 24, seed=3), [(0, 90, 100), (1, 27, 30)])
        both = 9 * randn(30, 2 * 173, seed=4)
        outputs.append(
            [
                kernels.linear(x, kernels.pack(weight)),
                attended,
                kernels.rms_norm(x, x[0], 1e-5),
                kernels.silu_and_mul(both),
            ]
        )
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other))
