"""An FP8 checkpoint on the FlashInfer backend, over fake kernels: experts and linear layers stay in FP8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("flashinfer", reason="FlashInfer is not installed: make test-flashinfer")

from specdec.cache.pages import allocate_kv_cache
from specdec.kernels import select
from specdec.kernels.flashinfer.backend import FlashInferKernels
from specdec.kernels.flashinfer.experts import FusedExperts
from specdec.model.weights import CheckpointIndex, load_model
from specdec.step.batch import Extend, build_batch
from support import flashinfer_fakes, fp8_checkpoints

CONFIG = fp8_checkpoints.CONFIG | {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("kinds", [(), ("linear",), ("linear", "experts")])
def test_model(kinds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer_fakes.install(monkeypatch)

    def grouped(a: Tensor, b: Tensor, sa: Tensor, sb: Tensor, *, offs: Tensor, out_dtype: torch.dtype) -> Tensor:
        out, start = torch.empty(a.shape[0], b.shape[2], dtype=out_dtype), 0
        for e, end in enumerate(offs.tolist()):
            out[start:end] = ((a[start:end].double() * sa[start:end, None]) @ (b[e].double() * sb[e])).to(out_dtype)
            start = end
        return out

    monkeypatch.setattr(torch, "_scaled_grouped_mm", grouped)
    tensors = fp8_checkpoints.fp8_tensors(CONFIG, scale_dtype=torch.bfloat16)
    folder = fp8_checkpoints.write(tmp_path, CONFIG, tensors)
    index = CheckpointIndex.open(folder)
    logits = []
    for backend in (
        FlashInferKernels(torch.device("cpu"), FusedExperts(), frozenset(kinds)),
        select(torch.device("cpu"), torch.bfloat16, "reference"),
    ):
        model = load_model(index, backend)
        cache = allocate_kv_cache(model.config, 3, 3, 16, torch.bfloat16, torch.device("cpu"))
        batch = build_batch([Extend(list(range(3, 40)), 0, [0, 1, 2])], 16)
        with torch.inference_mode():
            logits.append(model.target.compute_logits(model.target(batch.input_ids, batch.metadata, cache)).float())
    error = ((logits[0] - logits[1]).norm() / logits[1].norm()).item()
    print(kinds, error)
    assert error < (0.1 if kinds else 0.02)
