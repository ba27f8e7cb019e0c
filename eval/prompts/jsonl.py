"""Reads prompts from JSONL files: UTF-8, one JSON object a line, blank lines allowed, `.gz` or not. Each line has a
form:

    {"question_id": 81, "category": "writing", "turns": ["Compose ...", "Rewrite ..."], "reference": [...]}
        Spec-Bench and MT-Bench: one conversation, its user turns in order. reference may be missing and is ignored.
    {"prompt": "def f(", "category": "code", "source": "ast.py", "question_id": 1}
        A plain prompt: one turn. category is the file's name and question_id none where they are missing.
    {"task_id": "HumanEval/0", "prompt": "def f(", "entry_point": ..., "canonical_solution": ..., "test": ...}
        HumanEval: one turn. category is the file's name. The last three may be missing and are ignored.

Any other key is an error: a misspelt one would be lost. Texts must hold more than white space.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specdec.eval.prompts.prompt import Prompt

Record = dict[str, Any]

# The first of these keys that a record has says its form: what must be there, what may, what is ignored.
FORMS = {
    "turns": (("question_id", "category", "turns"), (), ("reference",)),
    "task_id": (("task_id", "prompt"), (), ("entry_point", "canonical_solution", "test")),
    "prompt": (("prompt",), ("category", "source", "question_id"), ()),
}
TYPE_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def read_jsonl(path: Path, *, category: str | None = None, skip_bad: bool = False) -> tuple[list[Prompt], int]:
    """Returns the file's prompts in its order, and the number of bad lines left out.

    path: the file.
    category: of prompts that do not say theirs; None: the file's name without .jsonl.
    skip_bad: whether bad lines are left out instead of raised.

    Raises ValueError for a bad line, as `FILE line N: reason`, N from 1, and for a file without a good one.
    """
    default = Path(path.name.removesuffix(".gz")).stem if category is None else category
    prompts: list[Prompt] = []
    faults: list[str] = []
    first_lines: dict[tuple[str, str], int] = {}
    for number, line in _lines(path):
        try:
            record = _load(line)
            prompt = _parse(record, default, f"{path.name} line {number}")
            _check_new(record, number, first_lines)
            prompts.append(prompt)
        except ValueError as error:
            faults.append(f"{path} line {number}: {error}")
            if not skip_bad:
                raise ValueError(faults[0]) from error
    if not prompts:
        bad = f"all {len(faults)} lines are bad, {faults[0]}" if faults else "the file is empty"
        raise ValueError(f"{path} has no prompts: {bad}")
    return prompts, len(faults)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that are not blank, with their numbers from 1; only a line feed ends a line."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file: {error}") from error
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _load(line: bytes) -> Record:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}") from error
    try:
        record = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}: column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not JSON: nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"{_type_name(record)}, an object is needed")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return record


def _parse(record: Record, default_category: str, default_source: str) -> Prompt:
    form = next((key for key in FORMS if key in record), None)
    if form is None:
        raise ValueError("neither 'turns' nor 'prompt'")
    required, optional, ignored = FORMS[form]
    for key in required:
        if key not in record:
            raise ValueError(f"no {key!r}")
    for key in record:
        if key not in (*required, *optional, *ignored):
            known = ", ".join((*required, *optional, *ignored))
            raise ValueError(f"unknown key {key!r}: a line with {form!r} has {known}")
    turns = _turns(record["turns"]) if form == "turns" else (_text(record["prompt"], "prompt"),)
    category = _text(record["category"], "category") if "category" in record else default_category
    return Prompt(turns, category, _source(record, default_source))


def _turns(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"turns is {_type_name(value)}, an array of strings is needed")
    if not value:
        raise ValueError("turns is empty")
    return tuple(_text(turn, f"turn {i}") for i, turn in enumerate(value, start=1))


def _source(record: Record, default: str) -> str:
    if "question_id" in record:
        question = record["question_id"]
        if isinstance(question, bool) or not isinstance(question, int | str):
            raise ValueError(f"question_id is {_type_name(question)}, an integer or a string is needed")
        default = f"question {_text(str(question), 'question_id')}"
    key = "task_id" if "task_id" in record else "source"
    return _text(record[key], key) if key in record else default


def _check_new(record: Record, number: int, first_lines: dict[tuple[str, str], int]) -> None:
    for key in {"question_id", "task_id"} & record.keys():
        first = first_lines.setdefault((key, str(record[key])), number)
        if first != number:
            raise ValueError(f"{key} {record[key]!r} is that of line {first} already")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_type_name(value)}, a string is needed")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a surrogate pair, \\u{ord(value[error.start]):04x}: no text") from error
    return value


def _type_name(value: object) -> str:
    return TYPE_NAMES.get(type(value), "a number")
