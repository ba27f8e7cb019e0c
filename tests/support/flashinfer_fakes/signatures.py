"""The signatures of FlashInfer 0.7.2.post1, which every call must fit, and those of what is installed."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMITTED: dict[str, Any] = json.loads((Path(__file__).parent / "signatures.json").read_text())
# `plan` of the decode wrapper takes any keyword and hands them on.
BOUND = {
    "BatchDecode.plan": "BatchDecode._plan_impl",
    "BatchDecode.__init__": "BatchDecode.__init__",
    "BatchDecode.run": "BatchDecode.run",
    "BatchPrefill.__init__": "BatchPrefill.__init__",
    "BatchPrefill.plan": "BatchPrefill.plan",
    "BatchPrefill.run": "BatchPrefill.run",
}
BACKEND_FUNCTIONS = (
    "append_paged_kv_cache", "rmsnorm", "fused_add_rmsnorm", "silu_and_mul", "apply_rope_with_cos_sin_cache_inplace",
)  # fmt: skip


@functools.cache
def committed(name: str) -> inspect.Signature:
    """Defaults that are no literals have no say in binding."""
    text = COMMITTED["signatures"][name].replace("= ActivationType.Swiglu", "= None")
    namespace: dict[str, Any] = {}
    exec(f"from __future__ import annotations\ndef f{text}: ...", namespace)
    return inspect.signature(namespace["f"])


def installed() -> dict[str, str]:
    import flashinfer
    import flashinfer.fused_moe
    from flashinfer import norm, page, rope, sampling

    places: dict[str, Any] = {
        "BatchPrefill": flashinfer.BatchPrefillWithPagedKVCacheWrapper,
        "BatchDecode": flashinfer.BatchDecodeWithPagedKVCacheWrapper,
        "sampling": sampling,
    }
    functions: dict[str, Any] = {
        "append_paged_kv_cache": page.append_paged_kv_cache,
        "get_batch_indices_positions": page.get_batch_indices_positions,
        "rmsnorm": norm.rmsnorm,
        "fused_add_rmsnorm": norm.fused_add_rmsnorm,
        "silu_and_mul": flashinfer.silu_and_mul,
        "apply_rope_with_cos_sin_cache_inplace": rope.apply_rope_with_cos_sin_cache_inplace,
        "cutlass_fused_moe": flashinfer.fused_moe.cutlass_fused_moe,
    }
    found = {}
    for name in COMMITTED["signatures"]:
        owner, _, attribute = name.partition(".")
        function = getattr(places[owner], attribute) if attribute else functions[name]
        found[name] = str(inspect.signature(function))
    return found


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    import flashinfer

    from specdec.kernels.flashinfer import backend, experts

    classes = {
        "BatchPrefill": flashinfer.BatchPrefillWithPagedKVCacheWrapper,
        "BatchDecode": flashinfer.BatchDecodeWithPagedKVCacheWrapper,
    }
    for name, signature in BOUND.items():
        owner, attribute = name.split(".")
        monkeypatch.setattr(classes[owner], attribute, binding(signature, getattr(classes[owner], attribute)))
    for name in BACKEND_FUNCTIONS:
        monkeypatch.setattr(backend, name, binding(name, getattr(backend, name)))
    for name in ("silu_and_mul", "cutlass_fused_moe"):
        monkeypatch.setattr(experts, name, binding(name, getattr(experts, name)))


def binding(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    signature = committed(name)

    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return function(*args, **kwargs)

    return bound
