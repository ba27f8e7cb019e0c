from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.fakes import WHY_NO_COMPILER, write_checkpoint

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it; tables are to be as wide as without a terminal

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported


def pytest_configure(config: pytest.Config) -> None:
    """Without a compiler every engine says that it is slow; the tests of that warning look for it themselves."""
    if WHY_NO_COMPILER:
        config.addinivalue_line("filterwarnings", "ignore:using the slow reference kernels")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with byte tokens and an MTP layer; its drafts are almost never accepted."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: whatever reads it before writing it shows."""

    def poisoned(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = plain(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
