"""Compiling at first use: the cache, and what happens where it cannot be done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specdec import SpecdecWarning
from specdec.kernels import KernelsUnavailableError, select
from specdec.kernels.cpu import build
from support.fakes import NEEDS_COMPILER

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))


def assert_falls_back(message: str) -> None:
    with pytest.raises(KernelsUnavailableError, match=message):
        select(CPU, torch.float32, "cpu")
    with pytest.warns(SpecdecWarning, match=f"(?s)using the slow reference kernels: .*{message}"):
        assert select(CPU, torch.float32).name == "reference"


def test_without_a_compiler_auto_falls_back_and_cpu_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert_falls_back("no C\\+\\+ compiler was found")


def test_a_failing_compiler_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken++"
    broken.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert_falls_back("no such option")
    assert list((tmp_path / "cache").rglob("*.so")) == []


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file"))
    assert_falls_back("cannot be written.*SPECDEC_CACHE moves it")


@pytest.mark.slow
@NEEDS_COMPILER
def test_several_processes_may_compile_at_once(tmp_path: Path) -> None:
    """Two start together on an empty cache; both compute, and one whole library is left."""
    script = (
        "import torch; from specdec.kernels import select; k = select(torch.device('cpu'), torch.float32, 'cpu');"
        "print(k.linear(torch.ones(1, 3), k.pack(torch.ones(2, 3))).tolist())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ.copy())
        for _ in range(2)
    ]
    assert [p.communicate()[0].strip() for p in processes] == ["[[3.0, 3.0]]"] * 2
    (library,) = (tmp_path / "cache").rglob("*.so")
    assert build.library_path() == library


@NEEDS_COMPILER
def test_the_cache_is_keyed_by_sources_and_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = build._find_compiler()
    key = build._key(compiler, build.FLAGS)
    sources = tmp_path / "src"
    sources.mkdir()
    for path in build.SOURCES.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build._key(compiler, build.FLAGS) == key
    assert build._key(compiler, [*build.FLAGS, "-g"]) != key
    (sources / "api.cpp").write_text("changed")
    assert build._key(compiler, build.FLAGS) != key
