"""Keeps what is finished in the output folder, whole, so that a run that was stopped anywhere can go on.

run.json          what is being measured, with what, since when
cells/NAME.json   records of one cell, repeat and round; NAME is `part_name`'s
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from specdec.eval.acceptance.plan import Cell
from specdec.eval.acceptance.records import Analysis, RequestRecord
from specdec.eval.acceptance.results import RESULTS_NAME, utc_now
from specdec.eval.files import write_whole

RUN_NAME, CELLS_NAME = "run.json", "cells"


def part_name(cell: Cell, repeat: int, number: int) -> str:
    """Returns the name of a cell's round. repeat, number: of the repeat and of the round, from 0."""
    return f"{cell.name}.repeat{repeat}.round{number}"


class Store:
    """The parts of a run that are finished. `started`: when the run began, before any interruption."""

    def __init__(self, folder: Path, started: str) -> None:
        self.folder, self.started = folder, started
        (folder / CELLS_NAME).mkdir(exist_ok=True)

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any], *, resume: bool) -> Store:
        """Opens a folder.

        folder: made where it is not there.
        identity: all that results depend on, as JSON; a run goes on only where it is the same.
        resume: whether to go on from what the folder holds.

        Raises ValueError for a folder with results unless resume, and for results of something else.
        """
        path = folder / RUN_NAME
        if path.exists() and resume:
            run = json.loads(path.read_text(encoding="utf-8"))
            different = list(_differences(run["identity"], json.loads(json.dumps(identity)), ""))
            if different:
                more = f" (and {len(different) - 1} differences more)" if len(different) > 1 else ""
                raise ValueError(
                    f"{folder} holds results of another run, with {different[0]}{more}: repeat its options, or choose "
                    "another folder"
                )
            return cls(folder, run["started"])
        for name in (RUN_NAME, CELLS_NAME, RESULTS_NAME):
            if (folder / name).exists():
                remedy = "choose another folder" if resume else "go on with --resume, or choose another folder"
                raise ValueError(f"{folder} holds results already ({name}): {remedy}")
        folder.mkdir(parents=True, exist_ok=True)
        started = utc_now()
        write_whole(path, json.dumps({"started": started, "identity": identity}, indent=2) + "\n")
        return cls(folder, started)

    def has(self, name: str) -> bool:
        """Returns whether a part is finished."""
        return self._path(name).exists()

    def save(self, name: str, document: dict[str, Any]) -> None:
        """Writes a part that is finished."""
        write_whole(self._path(name), json.dumps(document))

    def load(self, name: str) -> dict[str, Any]:
        """Reads a part that is finished."""
        document: dict[str, Any] = json.loads(self._path(name).read_text(encoding="utf-8"))
        return document

    def _path(self, name: str) -> Path:
        return self.folder / CELLS_NAME / f"{name}.json"


def _differences(before: Any, now: Any, path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path} = {json.dumps(before)} instead of {json.dumps(now)}"


def as_document(record: RequestRecord) -> dict[str, Any]:
    """Returns a record as JSON; NaN stays NaN."""
    document = {f.name: getattr(record, f.name) for f in fields(record)}
    if record.analysis is not None:
        document["analysis"] = {f.name: getattr(record.analysis, f.name) for f in fields(Analysis)}
    return _listed(document)


def as_record(document: dict[str, Any]) -> RequestRecord:
    """Returns the record that `as_document` made a document of."""
    values = dict(document)
    for name in ("starts", "num_drafted", "num_accepted"):
        values[name] = np.array(values[name], np.int64)
    if (found := values["analysis"]) is not None:
        num = len(found["indices"])
        values["analysis"] = Analysis(
            indices=np.array(found["indices"], np.int64),
            num_other_drafts=found["num_other_drafts"],
            **{
                name: np.array(found[name], np.float64).reshape(num, -1)
                for name in ("expected", "confidence", "entropy", "alpha")
            },
        )
    return RequestRecord(**values)


def _listed(document: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _listed(value) if isinstance(value, dict) else value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in document.items()
    }
