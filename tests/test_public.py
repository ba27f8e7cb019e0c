"""What a user imports: the names, their types, the errors."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

import specdec
from specdec import errors
from specdec.cli.common import user_errors

PUBLIC = [
    "AsyncEngine", "AsyncTokenStream", "CacheFullError", "CheckpointError", "CostTable", "DraftLengthStats",
    "DraftRequest", "DraftStats", "Drafter", "DrafterError", "Engine", "EngineConfig", "EngineInUseError",
    "EngineStats", "FinishReason", "GenerationOutput", "Histogram", "KernelsUnavailableError", "ModelError",
    "NotEnoughMemoryError", "Prompt", "QueueFullError", "RequestStats", "SamplingParams", "SpecdecError",
    "SpecdecWarning", "SpeculationParams", "StepTimes", "StreamChunk", "TokenLogprobs", "TokenStream",
    "__version__",
]  # fmt: skip


def test_the_public_names_are_these_and_all_are_there() -> None:
    assert specdec.__all__ == PUBLIC
    assert dir(specdec) == PUBLIC
    for name in PUBLIC:
        assert getattr(specdec, name) is not None
    with pytest.raises(AttributeError, match="module 'specdec' has no attribute 'Tokeniser'"):
        specdec.Tokeniser  # noqa: B018


def test_static_tools_see_the_same_names_in_their_homes() -> None:
    """What is imported under TYPE_CHECKING is what is handed out, and is defined there."""
    tree = ast.parse(Path(specdec.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = {name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert sorted(imports) == PUBLIC[:-1]
    for name, module in imports.items():
        assert module is not None
        value = getattr(specdec, name)
        assert value is getattr(import_module(module), name)
        assert getattr(value, "__module__", module) in (module, "typing", "types")


def test_the_users_code_that_types_are_checked_on_has_every_name() -> None:
    tree = ast.parse((Path(__file__).parent / "typing" / "user_code.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "specdec"]
    assert sorted(name.name for node in imports for name in node.names) == PUBLIC[:-1]


def test_what_users_meet_in_fields_is_public() -> None:
    public = [getattr(specdec, name) for name in PUBLIC]
    for owner in filter(dataclasses.is_dataclass, public):
        for field, hint in get_type_hints(owner).items():
            for kind in classes_in(hint):
                if kind.__module__.startswith("specdec"):
                    assert kind in public, f"{owner.__name__}.{field}"


def classes_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type):
        yield hint
    for argument in get_args(hint):
        yield from classes_in(argument)


def test_what_needs_no_torch_does_not_import_it() -> None:
    script = """
import sys, specdec
dir(specdec), specdec.__version__, specdec.SamplingParams, specdec.SpecdecError, specdec.CostTable, specdec.DraftStats
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_every_error_is_a_specdec_error_and_what_it_was_before() -> None:
    bases = {
        errors.CheckpointError: Exception,
        errors.KernelsUnavailableError: RuntimeError,
        errors.NotEnoughMemoryError: ValueError,
        errors.CacheFullError: RuntimeError,
        errors.QueueFullError: RuntimeError,
        errors.EngineInUseError: RuntimeError,
        errors.ModelError: RuntimeError,
        errors.DrafterError: ValueError,
    }
    assert set(errors.SpecdecError.__subclasses__()) >= set(bases)
    for error, base in bases.items():
        assert issubclass(error, errors.SpecdecError)
        assert issubclass(error, base)
        assert f" {error.__name__} " in errors.__doc__, "the tree of errors has it"


def test_the_command_line_exits_with_the_code_of_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    class Unusual(errors.SpecdecError):
        exit_code = 7

    for error, code in ((Unusual("odd"), 7), (errors.QueueFullError("full"), 1), (ValueError("no"), 1)):
        with pytest.raises(typer.Exit) as raised, user_errors():
            raise error
        assert raised.value.exit_code == code
        assert capsys.readouterr().err == f"specdec: {error}\n"
    with pytest.raises(RuntimeError, match="ours"), user_errors():
        raise RuntimeError("ours")
