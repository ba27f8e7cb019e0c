"""CUDA graphs on the fake device: a capture records operations and the tensors they read and write; a replay runs them
again on the same tensors, everything that they compute having been made NaN before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.flashinfer_fakes.device import FakeDevice

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "lift_fresh", "bincount")


class FakeGraph:
    """external: addresses of the memory that the capture reads or writes and has not made itself."""

    def __init__(self, fake: FakeDevice) -> None:
        self.fake = fake
        self.calls: list[Callable[[], None]] = []
        self.made: dict[int, Tensor] = {}
        self.external: set[int] = set()
        self.num_replays = 0

    def replay(self) -> None:
        assert self.fake.capturing is None, "a replay in a capture"
        self.num_replays += 1
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        for call in self.calls:
            call()

    def uses(self, *values: Any) -> None:
        self.external |= {storage(x) for x in tree_leaves(values) if isinstance(x, Tensor)} - self.made.keys()

    def makes(self, *values: Any) -> None:
        for x in tree_leaves(values):
            if isinstance(x, Tensor) and storage(x) not in self.external:
                self.made.setdefault(storage(x), x)


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Capture(TorchDispatchMode):
    """`with torch.cuda.graph(graph, pool=pool)`."""

    def __init__(self, graph: FakeGraph, pool: object) -> None:
        super().__init__()
        assert pool is not None, "graphs share one pool"
        self.graph = graph

    def __enter__(self) -> Any:
        assert self.graph.fake.capturing is None, "a capture in a capture"
        self.graph.fake.capturing = self.graph
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.graph.fake.capturing = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        assert name not in _WAITING, f"{name} in a capture"
        out = func(*args, **kwargs)
        self.graph.uses(args, kwargs)
        self.graph.makes(out)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if func._schema.is_mutable:
            self.graph.calls.append(lambda: _run_again(func, args, kwargs))
        elif not is_view and not name.startswith(("empty", "new_empty")):
            self.graph.calls.append(lambda: _compute_again(func, args, kwargs, out))
        return out


def _run_again(func: Any, args: Any, kwargs: Any) -> None:
    func(*args, **kwargs)


def _compute_again(func: Any, args: Any, kwargs: Any, into: Any) -> None:
    for old, new in zip(tree_leaves(into), tree_leaves(func(*args, **kwargs))):
        if isinstance(old, Tensor):
            old.copy_(new)


def install(fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(fake))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool=None: _Capture(graph, pool))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
