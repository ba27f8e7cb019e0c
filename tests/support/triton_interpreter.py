"""Triton's interpreter, in which its kernels run without a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import triton
import triton.language as tl


def hasten(patch: pytest.MonkeyPatch) -> None:
    """Spares the interpreter two things that take most of its time: patching Triton's language again at every call
    of one jitted function by another, and checking every integer addition for overflow."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    def call(function: Any, *args: object, **kwargs: object) -> Any:
        languages = [value for value in function.fn.__globals__.values() if value in (tl, tl.core)]
        if any(tl.core.is_builtin(language.load) for language in languages):  # not patched yet
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    builder = interpreter.interpreter_builder
    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
    patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
