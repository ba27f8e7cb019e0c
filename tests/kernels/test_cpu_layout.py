"""The structures that Python fills in are those that the C++ kernels read, or the library is refused."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p

import pytest
import torch

from specdec.kernels import select
from specdec.kernels.cpu import CpuKernels, native
from specdec.kernels.cpu.layout import check_layout
from support.fakes import NEEDS_COMPILER

Fields = list[tuple[str, type]]

CACHE: Fields = [
    ("data", c_void_p), ("dtype", c_int32), ("page_size", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64),
]  # fmt: skip


def structure(name: str, fields: Fields) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def changed(at: int, *fields: tuple[str, type]) -> Fields:
    """CACHE with `fields` in place of as many from `at` on."""
    return [*CACHE[:at], *fields, *CACHE[at + len(fields) :]]


MUTATIONS: dict[str, tuple[Fields, str]] = {
    "swapped, of one type": (changed(2, CACHE[3], CACHE[2]), "has page_size:int64@16 .* has kv_heads:int64@16"),
    "another type": (changed(3, ("kv_heads", c_double)), "has kv_heads:int64@24 .* has kv_heads:float64@24"),
    "another size, hidden by padding": (changed(1, ("dtype", c_int64)), "has dtype:int32@8 .* has dtype:int64@8"),
    "an integer for a pointer": (changed(0, ("data", c_int64)), "has data:pointer@0 .* has data:int64@0"),
    "one of an unknown type": (changed(1, ("dtype", ctypes.c_uint32)), "has dtype:int32@8 .* has dtype:c_uint(32)?@8"),
    "added at the end": ([*CACHE, ("more", c_int64)], "has size:40 .* has more:int64@40"),
    "added in the padding": ([*CACHE[:2], ("more", c_float), *CACHE[2:]], "has page_size:int64@16 .* more:float32@12"),
    "missing": (CACHE[:-1], "has head_dim:int64@32 .* has size:32"),
}  # fmt: skip


@NEEDS_COMPILER
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_library_of_other_structs_is_refused(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the kernels may fall back on the reference: this is a mistake of ours, not something unavailable."""
    fields, message = MUTATIONS[mutation]
    monkeypatch.setattr(native, "Cache", structure("Cache", CACHE))
    CpuKernels(torch.float32)
    monkeypatch.setattr(native, "Cache", structure("Cache", fields))
    with pytest.raises(AssertionError, match=f"struct Cache: the C\\+\\+ library {message}"):
        CpuKernels(torch.float32)
    with pytest.raises(AssertionError, match="struct Cache"):
        select(torch.device("cpu"), torch.float32)


@NEEDS_COMPILER
def test_a_structure_of_one_side_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "More", structure("More", [("x", c_int64)]), raising=False)
    with pytest.raises(AssertionError, match="struct More: the C\\+\\+ library has nothing where"):
        native.load_library("native")
    monkeypatch.delattr(native, "More")
    monkeypatch.delattr(native, "Routing")
    with pytest.raises(AssertionError, match=r"struct Routing: .* where the ctypes class has nothing"):
        native.load_library("native")


def test_structs_within_structs_and_pointers_to_them() -> None:
    inner = structure("Inner", [("x", c_float)])
    outer = structure("Outer", [("inner", inner), ("others", POINTER(inner))])
    library = {"Inner": ["x:float32@0", "size:4"], "Outer": ["inner:Inner@0", "others:pointer@8", "size:16"]}
    check_layout(library, [outer, inner])
    library["Outer"][1] = "others:pointer@16"
    with pytest.raises(AssertionError, match=r"struct Outer: .* others:pointer@16 .* others:pointer@8"):
        check_layout(library, [outer, inner])
