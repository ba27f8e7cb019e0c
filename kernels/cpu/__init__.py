"""C++ kernels for the CPU: each weight is read once for all rows, and a row's bits do not depend on its neighbours.

Weights are fp32 or bf16, packed once at load; activations and accumulation are fp32.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.cpu.build import library_path
from specdec.kernels.interface import AttentionMetadata, RoutingConfig

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LANES = 16

_SIGNATURES = {
    "sd_pack": [c_void_p, c_int32, c_int64, c_int64, c_void_p],
    "sd_linear": [c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int32],
    "sd_rms_norm": [c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p, c_int32],
    "sd_add_rms_norm": [c_void_p, c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p, c_void_p, c_int32],
    "sd_rope": [c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int32],
    "sd_silu_and_mul": [c_void_p, c_int64, c_int64, c_void_p, c_int32],
    "sd_route": [c_void_p, c_void_p, *[c_int64] * 5, c_int32, c_float, c_void_p, c_void_p, c_int32],
    "sd_moe": [c_void_p, c_void_p, c_void_p, *[c_int64] * 5, c_void_p, c_void_p, c_int32, c_void_p, c_int32],
    "sd_append": [c_void_p, c_int32, *[c_int64] * 3, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64],
    "sd_attention": [
        c_void_p, c_int32, *[c_int64] * 4, c_void_p, c_int64, c_int64, *[c_void_p] * 4, c_void_p, c_int32,
    ],
}  # fmt: skip


def load_library() -> ctypes.CDLL:
    """Compiles if need be, and declares every function. Raises KernelsUnavailableError."""
    library = ctypes.CDLL(str(library_path()))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = None, arguments
    return library


@dataclass(frozen=True)
class PackedWeight:
    """`shape` as before packing, [out, in] or [E, out, in]; `data` holds [ceil(out / 16)][in][16] per matrix."""

    shape: tuple[int, ...]
    data: Tensor

    @property
    def dtype_code(self) -> int:
        return DTYPES[self.data.dtype]


class CpuKernels:
    """The C++ backend; see `specdec.kernels.interface.Kernels` for the contracts."""

    name = "cpu"
    activation_dtype = torch.float32
    cache_dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: of the weights, float32 or bfloat16. Raises
        KernelsUnavailableError, and ValueError for another dtype."""
        if dtype not in DTYPES:
            raise ValueError(f"kernels='cpu' have weights in float32 or bfloat16, not {dtype}")
        self.device, self.dtype = torch.device("cpu"), dtype
        self._library = load_library()

    def pack(self, weight: Tensor) -> PackedWeight:
        *stack, out, size_in = weight.shape
        matrices = weight.contiguous().view(-1, out, size_in)
        data = torch.zeros(len(matrices), -(-out // LANES) * LANES * size_in, dtype=weight.dtype)
        for matrix, packed in zip(matrices, data):
            self._library.sd_pack(matrix.data_ptr(), DTYPES[weight.dtype], out, size_in, packed.data_ptr())
        return PackedWeight((*stack, out, size_in), data)

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        x = x.contiguous()
        out, size_in = weight.shape
        y = torch.empty(x.shape[0], -(-out // LANES) * LANES)
        self._library.sd_linear(
            weight.data.data_ptr(), weight.dtype_code, None if bias is None else bias.data_ptr(), out, size_in,
            x.data_ptr(), x.shape[0], y.data_ptr(), y.shape[1], torch.get_num_threads(),
        )  # fmt: skip
        return y if out == y.shape[1] else y[:, :out].contiguous()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        size = x.shape[-1]
        self._library.sd_rms_norm(
            x.data_ptr(), weight.data_ptr(), eps, x.numel() // size, size, y.data_ptr(), torch.get_num_threads()
        )
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        y, total = torch.empty_like(x), torch.empty_like(x)
        self._library.sd_add_rms_norm(
            x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, x.shape[0], x.shape[1],
            y.data_ptr(), total.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y, total

    def rope_(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        for x in (q, k):
            assert x.stride()[1:] == (x.shape[2], 1), "heads lie side by side"
            self._library.sd_rope(
                x.data_ptr(), *x.shape, x.stride(0), positions.data_ptr(), cos_sin.data_ptr(), cos_sin.shape[1],
                torch.get_num_threads(),
            )  # fmt: skip

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, both = gate_up.shape
        y = torch.empty(rows, both // 2)
        self._library.sd_silu_and_mul(gate_up.data_ptr(), rows, both // 2, y.data_ptr(), torch.get_num_threads())
        return y

    def route(self, router_logits: Tensor, correction_bias: Tensor, config: RoutingConfig) -> tuple[Tensor, Tensor]:
        logits = router_logits.contiguous()
        rows, k = logits.shape[0], config.num_experts_per_tok
        ids, weights = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k)
        self._library.sd_route(
            logits.data_ptr(), correction_bias.data_ptr(), rows, logits.shape[1], k, config.n_group, config.topk_group,
            config.norm_topk_prob, config.routed_scaling_factor, ids.data_ptr(), weights.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return ids, weights

    def moe(
        self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: PackedWeight, down: PackedWeight
    ) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        num_experts, hidden, width = down.shape
        self._library.sd_moe(
            x.data_ptr(), expert_ids.data_ptr(), expert_weights.data_ptr(), *expert_ids.shape, num_experts, hidden,
            width, gate_up.data.data_ptr(), down.data.data_ptr(), down.dtype_code, y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    def append_kv(self, k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        assert kv_cache.is_contiguous()
        _, _, page_size, kv_heads, dim = kv_cache.shape
        self._library.sd_append(
            kv_cache.data_ptr(), DTYPES[kv_cache.dtype], page_size, kv_heads, dim, k.data_ptr(), v.data_ptr(),
            k.stride(0), v.stride(0), slot_mapping.data_ptr(), len(slot_mapping),
        )  # fmt: skip

    def paged_attention(self, q: Tensor, kv_cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        _, _, page_size, kv_heads, dim = kv_cache.shape
        packed = metadata.packed
        out = torch.empty(q.shape)
        self._library.sd_attention(
            kv_cache.data_ptr(), DTYPES[kv_cache.dtype], page_size, kv_heads, dim, q.shape[1], q.data_ptr(),
            q.stride(0), len(metadata.kv_lens), packed.query_starts.data_ptr(), packed.kv_lens.data_ptr(),
            packed.page_starts.data_ptr(), packed.pages.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out
