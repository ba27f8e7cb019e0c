"""What all commands share: where messages go, and what becomes of a user's mistake.

Text goes to stdout, everything else to stderr. Exit codes: 0; 1 for a model or prompt that cannot be used, or a check
that failed; 2 for an invalid option; 130 on Ctrl-C.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import typer
from rich.console import Console

Number = TypeVar("Number", int, float)

TABLE_WIDTH = 140

err = Console(stderr=True, highlight=False)

MODEL_HELP = "'bundled', a checkpoint folder, or a Hub id."
KERNELS_HELP = "auto, reference, cpu (C++) or flashinfer (CUDA)."
DTYPE_HELP = "auto, bfloat16, float16, float32, float64, or int8 (quantised as it is loaded)."
JSON_HELP = "Print one JSON document instead of tables."


class InvalidOption(Exception):
    """An option value that can never work: exit code 2."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a user's mistake into one line on stderr and an exit code."""
    try:
        from specdec.errors import CacheFullError, KernelsUnavailableError, ModelError, SpecdecWarning
        from specdec.model.errors import CheckpointError
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", SpecdecWarning)
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}", "yellow")
            yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except InvalidOption as error:
        fail(error, 2)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except (CheckpointError, CacheFullError, KernelsUnavailableError, ModelError, ValueError, OSError) as error:
        fail(error, 1)


@contextmanager
def option_errors() -> Iterator[None]:
    """A ValueError in here is about the options' values."""
    try:
        yield
    except ValueError as error:
        raise InvalidOption(str(error)) from error


def fail(error: Exception, code: int) -> NoReturn:
    say(f"specdec: {error}", "red")
    raise typer.Exit(code)


def say(message: str, style: str) -> None:
    """One line on stderr, never wrapped."""
    err.print(message, style=style, soft_wrap=True, markup=False, emoji=False)


def tables() -> Console:
    """Standard output for tables: as wide as the terminal, and wide where there is none."""
    out = Console(highlight=False)
    return out if out.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=TABLE_WIDTH)


def check_backend(device: str, dtype: str, kernels: str, threads: int | None) -> None:
    """Impossible values are seen before anything is loaded."""
    from specdec.kernels import check_name
    from specdec.loading import check_num_threads, resolve_device, resolve_dtype

    with option_errors():
        check_name(kernels)
        resolve_device(device)
        if dtype != "auto":
            resolve_dtype(dtype)
        if threads is not None:
            check_num_threads(threads)


def check_folder_of(name: str, path: Path) -> None:
    """A file or folder can be made at `path`; seen before any work is done."""
    if not path.absolute().parent.is_dir():
        raise InvalidOption(f"{name} {path}: there is no folder {path.absolute().parent}")


def check_matplotlib() -> None:
    """It can be imported, to draw charts with; seen before any work is done."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "the report's charts are drawn with matplotlib, which is not installed: pip install matplotlib"
        )


def as_words(text: str) -> tuple[Any, ...]:
    """ "a, b" -> ("a", "b")"""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def as_numbers(name: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    """ "1,2,4" -> (1, 2, 4)"""
    try:
        return tuple(kind(word) for word in as_words(text))
    except ValueError:
        kinds = "integers" if kind is int else "numbers"
        raise InvalidOption(f"{name} {text}: give {kinds} with commas between them, for instance 1,2,4") from None
