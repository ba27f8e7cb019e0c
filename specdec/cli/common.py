"""Code that all commands share: where messages go, and what becomes of a user's mistake.

Text goes to stdout, everything else to stderr. Exit codes: 0; 1 for a model or prompt that cannot be used, or a check
that failed; 2 for an invalid option; 130 on Ctrl-C.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from specdec.errors import SpecdecError, SpecdecWarning

if TYPE_CHECKING:
    from specdec.kernels.progress import Progress as Report

Number = TypeVar("Number", int, float)

TABLE_WIDTH = 140

err = Console(stderr=True, highlight=False)

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"

# The options that several commands have; a command's own stand above it.
Model = Annotated[str, typer.Option(help="'bundled', a checkpoint folder, or a Hub id.")]
Kernels = Annotated[str, typer.Option(help="auto, reference, cpu (C++) or flashinfer (CUDA).")]
Dtype = Annotated[
    str, typer.Option(help="auto, bfloat16, float16, float32, float64, or int8 (quantised as it is loaded).")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="all")]
Revision = Annotated[str | None, typer.Option(help="Revision of a Hub id.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
OutputFile = Annotated[Path | None, typer.Option(help="Also write the JSON here.", show_default=False)]


class InvalidOption(SpecdecError):
    """An option value that can never work."""

    exit_code = 2


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a user's mistake into one line on stderr and an exit code, while the context is entered."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", SpecdecWarning)
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}", "yellow")
            yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except SpecdecError as error:
        fail(error, error.exit_code)
    except (ValueError, OSError) as error:
        fail(error, 1)


@contextmanager
def option_errors() -> Iterator[None]:
    """Turns a ValueError into an InvalidOption, while the context is entered."""
    try:
        yield
    except ValueError as error:
        raise InvalidOption(str(error)) from error


def fail(error: Exception, code: int) -> NoReturn:
    """Prints an error on stderr and ends the command with an exit code."""
    say(f"specdec: {error}", "red")
    raise typer.Exit(code)


def say(message: str, style: str) -> None:
    """Prints one line on stderr, never wrapped. style: rich's."""
    err.print(message, style=style, soft_wrap=True, markup=False, emoji=False)


class LogHandler(logging.Handler):
    """Writes log records to stderr, above a progress bar that is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(self.format(record), "none")
        except Exception:  # as in every handler: what is logged must not fail for that
            self.handleError(record)


@contextmanager
def log_to_stderr(level: int) -> Iterator[None]:
    """Writes what the package logs from `level` on to stderr, while the context is entered."""
    logger, handler = logging.getLogger("specdec"), LogHandler()
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def log_level(verbose: int, variable: str) -> int | None:
    """Returns the level to log from; None for no log. Raises InvalidOption for an unknown level.

    verbose: how often -v is given, which wins.
    variable: the environment's SPECDEC_LOG_LEVEL.
    """
    if verbose:
        return logging.INFO if verbose == 1 else logging.DEBUG
    if not variable:
        return None
    if variable.upper() not in LOG_LEVELS:
        raise InvalidOption(f"SPECDEC_LOG_LEVEL = {variable!r} is unknown: choose one of {', '.join(LOG_LEVELS)}")
    return logging.getLevelNamesMapping()[variable.upper()]


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Yields a function that draws one task after the other on stderr, and nothing where that is no terminal.

    A task with a total of 1 has a bar that only moves.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(escape(what), total=total if total > 1 else None)
            bar.update(tasks[what], completed=done, visible=done < total)

        yield report


def tables() -> Console:
    """Returns standard output for tables: as wide as the terminal, or 140 columns where there is none."""
    out = Console(highlight=False)
    return out if out.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=TABLE_WIDTH)


def check_backend(device: str, dtype: str, kernels: str, threads: int | None) -> None:
    """Raises InvalidOption for values that cannot work, before anything is loaded; the parameters are the options."""
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
    """Raises InvalidOption where no file or folder can be made at `path`, before any work is done. name: the
    option's."""
    if not path.absolute().parent.is_dir():
        raise InvalidOption(f"{name} {path}: there is no folder {path.absolute().parent}")


def check_matplotlib() -> None:
    """Raises ValueError where matplotlib is not installed, before any work is done."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "the report's charts are drawn with matplotlib, which is not installed: pip install matplotlib"
        )


def as_words(text: str) -> tuple[Any, ...]:
    """Returns the words of a list with commas: "a, b" gives ("a", "b")."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def as_numbers(name: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    """Returns the numbers of a list with commas: "1,2,4" gives (1, 2, 4). Raises InvalidOption where one is none.

    name: the option's.
    text: its value.
    kind: int or float.
    """
    try:
        return tuple(kind(word) for word in as_words(text))
    except ValueError:
        kinds = "integers" if kind is int else "numbers"
        raise InvalidOption(f"{name} {text}: give {kinds} with commas between them, for instance 1,2,4") from None
