"""Finds a drafter of a user's own by name: what `specdec eval acceptance --drafter WHERE:NAME` measures.

WHERE is a Python file or an importable module. NAME in it is a class or function that makes a drafter when it is called
without arguments, or an object that drafts already.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from specdec.step.drafter import Drafter, is_drafter

FORM = "WHERE:NAME, a Python file or module and what drafts in it, for instance examples/own_drafter.py:NgramDrafter"
KINDS = "name a class or function that needs no arguments, or an object with a method draft(requests)"


@dataclass(frozen=True)
class DrafterSource:
    """What WHERE:NAME stands for."""

    given: str
    """WHERE:NAME as the user wrote it."""
    found: Any
    """What bears the name: a drafter, or what makes one."""
    sha256: str | None
    """Hash of the file that it was found in; None of a module without a file."""

    def make(self) -> Drafter:
        """Returns a new drafter, or always the same one where the name is an object's. ValueError where neither is."""
        if is_drafter(self.found):
            return self.found
        if not callable(self.found):
            raise ValueError(f"drafter = {self.given!r} is an object of {type(self.found).__name__}: {KINDS}")
        try:
            made = self.found()
        except (Exception, SystemExit) as error:
            raise _failure(f"drafter = {self.given!r} cannot be called without arguments", error, KINDS) from error
        if not is_drafter(made):
            kind = f"the class {made.__name__}" if isinstance(made, type) else f"an object of {type(made).__name__}"
            raise ValueError(
                f"drafter = {self.given!r} makes {kind}: make an object with a method draft(requests), see "
                "specdec.Drafter"
            )
        return made


def load_drafter(given: str) -> DrafterSource:
    """Imports the file or module. ValueError says what of WHERE:NAME is missing, or fails."""
    where, _, name = given.rpartition(":")
    if not where or not name:
        raise ValueError(f"drafter = {given!r} must be {FORM}")
    is_file = where.endswith(".py") or os.sep in where
    module = _from_file(given, Path(where)) if is_file else _by_name(given, where)
    if not hasattr(module, name):
        there = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        remedy = f"choose among {', '.join(there)}" if there else "define it there"
        raise ValueError(f"drafter = {given!r}: there is no {name} in {where}: {remedy}")
    return DrafterSource(given, getattr(module, name), _sha256(module))


def _from_file(given: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"drafter = {given!r}: there is no file {path}: give {FORM}")
    loader = SourceFileLoader(f"_drafter_in_{path.stem}", str(path))  # a name that hides no other module
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None, "a loader was given"
    module = sys.modules[loader.name] = module_from_spec(spec)  # where dataclasses look for it
    _look_in(path.parent)
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[loader.name]
        fault, remedy = f"drafter = {given!r}: {path} cannot be imported", f"`python {path}` shows where"
        raise _failure(fault, error, remedy) from error
    return module


def _by_name(given: str, name: str) -> ModuleType:
    _look_in(Path.cwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"drafter = {given!r}: there is no module {error.name}: install it, start in the folder where it lies, "
                "or give a Python file"
            ) from error
        remedy = f"`python -c 'import {name}'` shows where"
        raise _failure(f"drafter = {given!r}: {name} cannot be imported", error, remedy) from error


def _look_in(folder: Path) -> None:
    """Lets modules of the folder be imported, as those beside a script can be, unless others have their names."""
    if str(folder.absolute()) not in sys.path:
        sys.path.append(str(folder.absolute()))


def _failure(fault: str, error: BaseException, remedy: str) -> ValueError:
    """The message is one line."""
    what = " ".join(str(error).split())
    return ValueError(f"{fault} ({type(error).__name__}{f': {what}' if what else ''}): {remedy}")


def _sha256(module: ModuleType) -> str | None:
    path = getattr(module, "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path is not None else None
