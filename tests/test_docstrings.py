"""Docstrings can be read under help(), which shows them without the sentence that a name begins.

Sources are parsed, not imported: some modules need packages that are not here, as those for CUDA.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import specdec

ROOT = Path(specdec.__file__).parent
FOLDERS = [
    ROOT,
    *(ROOT / name for name in ("model", "kernels", "eval")),
]  # a checkout's are links, which globs leave out
MODULES = sorted({path for folder in FOLDERS for path in folder.rglob("*.py")})
CONTINUES_A_NAME = ("Of", "By", "In", "At", "As", "Those", "From", "With", "For")
PUBLIC_CLASSES = [value for name in specdec.__all__ if inspect.isclass(value := getattr(specdec, name))]


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields line and text of every string that is a statement: docstrings, and those under fields and constants."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if (text := text_of(statement)) is not None:
                yield statement.lineno, text


def text_of(statement: ast.stmt) -> str | None:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def without_subject(source: str) -> list[tuple[int, str]]:
    """The strings that read as the rest of a sentence which their name has begun."""
    return [
        (line, text.strip()[:60])
        for line, text in strings(ast.parse(source))
        if text.split() and text.split()[0].strip(".,:;") in CONTINUES_A_NAME
    ]


def documented_fields(definition: ast.ClassDef) -> set[str]:
    """The fields that have a string of their own under them."""
    pairs = zip(definition.body, definition.body[1:])
    return {
        field.target.id
        for field, after in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and text_of(after)
    }


def undocumented(cls: type[Any]) -> list[str]:
    """What lacks a docstring of the class, its bases in this package included: itself, public methods, fields."""
    found, fields = [], set[str]()
    for owner in (base for base in cls.__mro__ if base.__module__.startswith("specdec")):
        (definition,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        fields |= documented_fields(definition)
        members = [node for node in definition.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        lacking = [node.name for node in members if not node.name.startswith("_") and not ast.get_docstring(node)]
        found += [f"{owner.__name__}.{name}" for name in lacking]
        found += [] if ast.get_docstring(definition) else [owner.__name__]
    if dataclasses.is_dataclass(cls):
        found += [f"{cls.__name__}.{f.name}" for f in dataclasses.fields(cls) if f.name not in fields]
    return found


def test_all_modules_are_looked_at() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in MODULES}
    assert {
        "config.py",
        "model/mtp.py",
        "kernels/flashinfer/backend.py",
        "kernels/data.py",
        "kernels/decisions.py",
        "eval/lossless/law.py",
    } < names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_docstring_has_a_subject(path: Path) -> None:
    assert not without_subject(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("cls", PUBLIC_CLASSES, ids=lambda cls: cls.__name__)
def test_every_public_class_method_and_field_has_a_docstring(cls: type[Any]) -> None:
    assert not undocumented(cls)


@pytest.mark.parametrize(
    "source",
    [
        '"""From a name to a model."""',
        'class A:\n    """Of one pair."""',
        'class A:\n    x: int = 0\n    """For every row."""',
        'def f():\n    """\n    In order.\n    """',
        'async def f():\n    def g():\n        """As: f."""',
    ],
    ids=["module", "class", "field", "function", "inner function"],
)
def test_a_docstring_that_continues_its_name_is_seen(source: str) -> None:
    assert len(without_subject(source)) == 1
    for word in CONTINUES_A_NAME:
        source = source.replace(f"{word} ", "Returns ").replace(f"{word}: ", "Returns ")
    assert not without_subject(source)


class Undocumented:
    """A class with all that may be forgotten."""

    def method(self) -> None: ...


@dataclasses.dataclass
class HalfDocumented:
    """A class of which one field is documented."""

    a: int
    """One."""
    b: int


def test_what_has_no_docstring_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Undocumented, HalfDocumented):
        monkeypatch.setattr(cls, "__module__", "specdec.mutant")
        monkeypatch.setattr(inspect, "getsource", lambda owner: SOURCES[owner.__name__])
    assert undocumented(Undocumented) == ["Undocumented.method"]
    assert undocumented(HalfDocumented) == ["HalfDocumented.b"]


SOURCES = {
    node.name: ast.unparse(node)
    for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef)
}
