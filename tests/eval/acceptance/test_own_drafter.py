"""WHERE:NAME of a user's own drafter: what it finds, and how each mistake is refused."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from specdec.eval.acceptance.own_drafter import load_drafter

EXAMPLE = Path(__file__).parents[3] / "examples" / "own_drafter.py"

FINDS = """
from __future__ import annotations
from dataclasses import dataclass

import a_module_beside

@dataclass
class Empty:
    seen: int = 0

    def draft(self, requests):
        return [[] for _ in requests]

class Needs:
    def __init__(self, path):
        pass

class Other:
    def propose(self, requests):
        return []

class Fails:
    def __init__(self):
        raise OSError("no\\ntable")

def make():
    return Empty()

def makes_the_class():
    return Empty

ready = Empty()
number = 3
"""


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with modules of all kinds, in which the process is."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # loading appends to it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_module_beside.py").write_text("")
    (tmp_path / "finds.py").write_text(FINDS)
    (tmp_path / "broken.py").write_text("import sys\nraise RuntimeError('two\\nlines')\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(2)\n")
    (tmp_path / "imports_none.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "empty.py").write_text("")
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text(FINDS)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("where", ["finds.py", "./finds.py", "some_package.inner", "{folder}/finds.py"])
@pytest.mark.parametrize("name", ["Empty", "make", "ready"])
def test_a_class_a_function_and_an_object_are_found(found: Path, where: str, name: str) -> None:
    source = load_drafter(f"{where.format(folder=found)}:{name}")
    made = source.make()
    assert made.draft([]) == []
    assert (source.make() is made) == (name == "ready"), "a class and a function make new ones"
    assert source.sha256 == hashlib.sha256(FINDS.encode()).hexdigest()


def test_the_example_is_found() -> None:
    assert load_drafter(f"{EXAMPLE}:NgramDrafter").make().draft([]) == []


MISTAKES = {
    "finds": r"drafter = 'finds' must be WHERE:NAME, a Python file or module and what drafts in it",
    ":Empty": "must be WHERE:NAME",
    "finds.py:": "must be WHERE:NAME",
    "none.py:Empty": r"'none.py:Empty': there is no file none.py: give WHERE:NAME",
    "no/such/file:Empty": "there is no file no/such/file",
    "no_such_module:Empty": "there is no module no_such_module: install it, start in the folder where it lies, or give",
    "some_package.none:Empty": r"there is no module some_package\.none",
    "finds.py:Emty": "there is no Emty in finds.py: choose among Empty, Needs, Other, Fails, make, makes_the_class, re",
    "empty.py:Empty": "there is no Empty in empty.py: define it there",
    "broken.py:X": r"broken.py cannot be imported \(RuntimeError: two lines\): `python broken.py` shows where",
    "broken:X": r"broken cannot be imported \(RuntimeError: two lines\): `python -c 'import broken'` shows where",
    "leaves.py:X": r"leaves.py cannot be imported \(SystemExit: 2\)",
    "imports_none.py:X": r"imports_none.py cannot be imported \(ModuleNotFoundError: No module named 'no_such",
    "imports_none:X": r"imports_none cannot be imported \(ModuleNotFoundError: No module named 'no_such_module_at_all'",
    "finds.py:Needs": r"'finds.py:Needs' cannot be called without arguments \(TypeError: .*'path'\): name a class or f",
    "finds.py:Fails": r"cannot be called without arguments \(OSError: no table\)",
    "finds.py:number": "'finds.py:number' is an object of int: name a class or function that needs no arguments, or an",
    "finds.py:Other": r"'finds.py:Other' makes an object of Other: make an object with a method draft\(requests\)",
    "finds.py:makes_the_class": "makes the class Empty: make an object with a method draft",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_what_cannot_be_used_is_refused_with_the_remedy(found: Path, given: str) -> None:
    with pytest.raises(ValueError, match=MISTAKES[given]) as raised:
        load_drafter(given).make()
    assert "\n" not in str(raised.value)
