"""Models as large as GLM-4.5 in little memory: their matrices lie in the same 40 MB, over and over (Linux)."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from support.fakes import randn, write_files

NUM_PAGES = 9973  # a prime number, so that no two experts begin at the same page
NUM_BYTES = NUM_PAGES * mmap.PAGESIZE
MAP_FIXED = 16


def write_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """All but its weights; a tensor of the MTP layer says that there is one."""
    write_files(folder, config)
    save_file({f"model.layers.{config['num_hidden_layers']}.enorm.weight": torch.ones(1)}, folder / "model.safetensors")
    return folder


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made from now on have such weights, each the same ones, whatever their checkpoints hold."""
    weights = _Weights()
    monkeypatch.setattr(nn.Module, "to_empty", lambda module, device: weights.fill(module))
    monkeypatch.setattr("specdec.model.weights._fill", lambda *_: None)
    monkeypatch.setattr("specdec.loading.available_memory_bytes", lambda: None)


class _Weights:
    """Norms near 1, routers and biases of their own; every other matrix begins at a page of its own."""

    def __init__(self) -> None:
        self.file = os.memfd_create("weights")
        block = randn(NUM_BYTES // 2).mul_(0.015).bfloat16()  # 1 / sqrt(hidden size), about
        os.write(self.file, block.view(torch.uint8).numpy().tobytes())
        self.tensors: dict[tuple[str, torch.Size], Tensor] = {}

    def fill(self, module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters()):
            owner, _, last = name.rpartition(".")
            weight = nn.Parameter(self._tensor(name, parameter), requires_grad=False)
            setattr(module.get_submodule(owner), last, weight)

    def _tensor(self, name: str, like: Tensor) -> Tensor:
        key = name, like.shape
        if key not in self.tensors:
            if like.dtype == torch.bfloat16 and like.dim() > 1:
                first_page = 97 * len(self.tensors) % NUM_PAGES
                self.tensors[key] = repeated(like.nbytes, self.file, first_page).view(like.dtype).view(like.shape)
            else:
                noise = randn(*like.shape, seed=len(self.tensors)) * 0.05
                self.tensors[key] = noise + name.endswith("norm.weight")
        return self.tensors[key].to(like.dtype)


def repeated(num_bytes: int, file: int, first_page: int) -> Tensor:
    """uint8 [num_bytes]: memory that repeats the file's from a page on, for as long as the process lives."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    readable, anywhere = mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = libc.mmap(None, num_bytes, readable, anywhere, -1, 0)
    start, at = 0, first_page * mmap.PAGESIZE
    while start < num_bytes:
        size = min(NUM_BYTES - at, num_bytes - start)
        mapped = libc.mmap(base + start, size, readable | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED, file, at)
        assert mapped == base + start
        start, at = start + size, 0
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(base), dtype=torch.uint8)
