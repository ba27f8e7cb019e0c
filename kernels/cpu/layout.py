"""The ctypes structures compared with the structs of the compiled library.

Python writes these structures and C++ reads them, so a field in another place would be silent corruption.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p, sizeof
from itertools import count, takewhile, zip_longest
from typing import Any, ClassVar

Layout = dict[str, list[str]]  # of each struct by name: its fields as "name:type@offset", then "size:bytes"

_SCALARS: dict[type, str] = {
    c_void_p: "pointer",
    c_int32: "int32",
    c_int64: "int64",
    c_float: "float32",
    c_double: "float64",
}


class _Entry(Structure):
    """The struct `LayoutEntry` of src/layout.h."""

    _fields_: ClassVar = [("name", c_char_p), ("type", c_char_p), ("bytes", c_int64)]


def library_layout(library: ctypes.CDLL) -> Layout:
    """Returns the layout that the C++ compiler gave the structs."""
    library.sd_layout.restype = POINTER(POINTER(_Entry))
    layout = {}
    for table in takewhile(bool, _items(library.sd_layout())):
        struct, *fields = takewhile(lambda entry: entry.name, _items(table))
        words = [f"{field.name.decode()}:{field.type.decode()}@{field.bytes}" for field in fields]
        layout[struct.name.decode()] = [*words, f"size:{struct.bytes}"]
    return layout


def _items(pointer: Any) -> Iterator[Any]:
    return map(pointer.__getitem__, count())


def check_layout(library: Layout, structures: Iterable[type[Structure]]) -> None:
    """Raises AssertionError, which names structure and field, unless `structures` are laid out like the library's."""
    ours = {structure.__name__: _describe(structure) for structure in structures}
    for name in library | ours:
        for there, here in zip_longest(library.get(name, []), ours.get(name, []), fillvalue="nothing"):
            if there != here:
                raise AssertionError(f"struct {name}: the C++ library has {there} where the ctypes class has {here}")


def _describe(structure: type[Structure]) -> list[str]:
    fields = [f"{name}:{_type_name(ctype)}@{getattr(structure, name).offset}" for name, ctype, *_ in structure._fields_]
    return [*fields, f"size:{sizeof(structure)}"]


def _type_name(ctype: type) -> str:
    if issubclass(ctype, ctypes._Pointer):
        return "pointer"
    return _SCALARS.get(ctype, ctype.__name__)
