"""Triton's kernels, on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from specdec.kernels.triton import TritonSampling


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")


@pytest.fixture
def kernels(device: torch.device) -> TritonSampling:
    kernels = TritonSampling()
    kernels.device = device
    return kernels


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> Iterator[None]:
    """Spares the interpreter two things that take most of its time: patching Triton's language again at every call
    of one jitted function by another, and checking every integer addition for overflow."""
    if not triton.knobs.runtime.interpret:
        yield
        return
    from triton.runtime import interpreter

    def call(function: Any, *args: object, **kwargs: object) -> Any:
        languages = [value for value in function.fn.__globals__.values() if value in (tl, tl.core)]
        if any(tl.core.is_builtin(language.load) for language in languages):  # not patched yet
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield
