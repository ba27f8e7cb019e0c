"""results.json: what is written is read again, and what is wrong is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdec import Engine
from specdec.eval.acceptance.metrics import cell_metrics
from specdec.eval.acceptance.plan import Cell
from specdec.eval.acceptance.records import Analysis, RequestRecord
from specdec.eval.acceptance.results import (
    checkpoint_sha256,
    provenance,
    read_results,
    utc_now,
    write_results,
)
from specdec.eval.acceptance.schema import faults
from specdec.eval.machine import git_revision, processor
from support.acceptance_document import cell, document, estimate, without_values

ADDED = {"final_loop_share", "by_expected_acceptance", "by_prompt", "warnings"}  # since the first release
SMALL: dict[str, Any] = document((0.0, 0.6), ("block",), (1, 2), (1,), ("code",))


def paths_of_fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every field of every object that the schema names."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        by_user = path[-1:] == ("options",) or path[-1:] == ("categories",)
        if isinstance(value, dict) and not by_user:
            yield (*path, key)
        yield from paths_of_fields(item, (*path, key))


def field_name(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def without(value: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    copy = deepcopy(value)
    place: Any = copy
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return copy


@pytest.mark.parametrize("made", [SMALL, document(), without_values(SMALL)], ids=["small", "large", "no values"])
def test_what_is_written_is_read_again(made: dict[str, Any], tmp_path: Path) -> None:
    path = write_results(made, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "results.json"
    assert read_results(path) == read_results(str(path.parent)) == made


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    made = deepcopy(SMALL)
    made["cells"][1]["all"]["speedup"] = {"value": float("nan"), "low": float("-inf"), "high": float("inf")}
    path = write_results(made, tmp_path)
    assert not re.search("NaN|Infinity", path.read_text())
    assert read_results(path)["cells"][1]["all"]["speedup"] == estimate(None)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(SMALL, tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_results(document(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert read_results(tmp_path) == SMALL


def test_a_document_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"results\.json: cells\[0\]\.batch_size is missing"):
        write_results(without(SMALL, ("cells", 0, "batch_size")), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_every_field_is_asked_for() -> None:
    """Of every object the last one of its list."""
    last = {tuple("[]" if isinstance(key, int) else key for key in path): path for path in paths_of_fields(SMALL)}
    assert len(last) > 150
    for path in last.values():
        added = path[-1] in ADDED or path == ("prompts", "sha256")
        missing = [] if added else [f"{field_name(path)} is missing"]
        assert list(faults(without(SMALL, path))) == missing


@pytest.mark.parametrize("path", [("cells", 1, name) for name in sorted(ADDED - {"final_loop_share"})])
def test_fields_of_a_later_release_are_checked_where_they_are(path: tuple[Any, ...], tmp_path: Path) -> None:
    made = deepcopy(SMALL)
    made["cells"][1][path[-1]] = 7
    assert list(faults(made)) == [f"{field_name(path)} must be {'a list' if path[-1] == 'warnings' else 'an object'}"]


def test_lists_of_numbers_take_one_line(tmp_path: Path) -> None:
    made = deepcopy(SMALL) | {"note": ["text\n[\n  1\n]", "[\n"], "mixed": [1, None], "none": []}
    made["cells"][1]["by_prompt"]["decode_s"] = [1e-07, 12.5, -3]
    text = write_results(made, tmp_path).read_text()
    assert '"decode_s": [1e-07, 12.5, -3]' in text
    assert read_results(tmp_path) == made


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("cells",), {}, "cells must be a list"),
        (("cells", 1), [], r"cells\[1\] must be an object"),
        (("cells", 1, "temperature"), "0.6", r"cells\[1\]\.temperature must be a number, it is '0\.6'"),
        (("cells", 1, "temperature"), None, "must be a number, it is None"),
        (("cells", 1, "batch_size"), 1.5, r"batch_size must be an integer, it is 1\.5"),
        (("cells", 1, "num_requests"), True, "must be an integer, it is True"),
        (("cells", 1, "all", "speedup"), 1.5, r"all\.speedup must be an object"),
        (("cells", 1, "all", "speedup", "low"), "x", r"speedup\.low must be a number"),
        (("cells", 1, "categories", "code", "ttft_s"), None, r"categories\.code\.ttft_s must be an object"),
        (("cells", 2, "check", "passed"), 1, "must be true or false, it is 1"),
        (("provenance", "threads"), 2, "must be a string, it is 2"),
        (("prompts", "categories", "code"), "many", r"prompts\.categories\.code must be an integer"),
        (("experts", "layers", 0, "points", 0, "expected"), None, "must be a number"),
    ],
)
def test_a_value_of_another_kind_is_named(path: tuple[Any, ...], value: object, message: str, tmp_path: Path) -> None:
    made = deepcopy(SMALL)
    place: Any = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "results.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match=rf"results\.json: .*{message}.*specdec eval acceptance"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON .*eval acceptance"),
        ('{"schema": ', "is not JSON"),
        (json.dumps(SMALL).replace('"experts": {', '"experts": {"x": NaN, '), "is not JSON .*it holds NaN"),
        ("[]", "has schema None, not 'specdec.acceptance'.*eval acceptance"),
        ('{"schema": "specdec.lossless", "version": 1}', "has schema 'specdec.lossless', not"),
        (json.dumps(SMALL | {"version": 2}), "version 2 .* reads up to 1: upgrade specdec"),
        (json.dumps(SMALL | {"version": 0}), "version 0, which must be an integer from 1"),
        (json.dumps(SMALL | {"version": True}), "version True, which must be"),
        (json.dumps(SMALL | {"version": "1"}), "version '1', which must be"),
        (json.dumps({k: v for k, v in SMALL.items() if k not in ("prompts", "options")}), r"options .*1 faults? more"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_with_a_remedy(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other name.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"other name\.json.*{message}"):
        read_results(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ValueError, match=r"\.json does not exist: give a results\.json .* or its folder"):
            read_results(path)
    (tmp_path / "results.json").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match="is not JSON"):
        read_results(tmp_path)
    (tmp_path / "folder.json" / "results.json").mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_results(tmp_path / "folder.json")


def test_a_field_that_is_not_known_is_kept(tmp_path: Path) -> None:
    made = deepcopy(SMALL) | {"note": "mine"}
    made["cells"][0]["all"]["speedup"]["note"] = "mine"
    write_results(made, tmp_path)
    assert read_results(tmp_path) == made


@pytest.mark.parametrize("analysed", [True, False])
def test_metrics_have_the_shape_of_a_cell(analysed: bool) -> None:
    ones = np.ones((2, 3))
    analysis = Analysis(np.array([0, 1]), 0.5 * ones, 0.7 * ones, ones, 0.6 * ones, 0) if analysed else None
    starts, drafted, accepted = np.array([5, 7]), np.array([3, 2]), np.array([1, 2])
    records = [
        RequestRecord(i, "code", 0, 0, 4, 9, 3, 3, starts, drafted, accepted, 0.1, 0.5, 8, analysis) for i in range(4)
    ]
    metrics = cell_metrics(Cell(0.6, 1, "block", "sampled", 3), records, records, [2.0])
    assert list(faults(SMALL | {"cells": [json.loads(json.dumps(metrics.as_dict()))]})) == []


def test_a_checkpoint_is_known_by_the_bytes_that_matter(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    def sha256() -> str:
        return checkpoint_sha256(Engine.from_pretrained(folder, kernels="reference").checkpoint.index)

    first = sha256()
    shell = "LC_ALL=C sha256sum config.json *.safetensors | sha256sum"
    printed = subprocess.run(shell, shell=True, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert printed.split()[0] == first
    (folder / "MODEL_CARD.md").write_text("a card")
    assert sha256() == first
    weights = next(folder.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    second = sha256()
    assert second != first
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert sha256() not in (first, second)


def test_provenance_says_what_was_measured(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, kernels="reference", dtype="float32")
    started = utc_now()
    known = provenance(engine, "specdec eval acceptance -k 3", started, sha256="abc")
    assert list(faults(SMALL | {"provenance": known})) == []
    assert known["checkpoint"] == {"folder": str(tiny_checkpoint), "sha256": "abc"}
    assert (known["kernels"], known["weights"]) == ("reference", "float32")
    assert (known["command"], known["processor"]) == ("specdec eval acceptance -k 3", processor())
    assert known["started"] == started <= known["finished"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", started)
    read = provenance(engine, "", started)["checkpoint"]["sha256"]
    assert read == checkpoint_sha256(engine.checkpoint.index)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_revision_is_that_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, installed = tmp_path / "package", tmp_path / ".venv" / "specdec"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "engine.py").write_text("x = 1\n")
    assert git_revision(package) is None
    git(tmp_path, "init")
    git(tmp_path, "add", "package")
    assert git_revision(package) is None  # nothing committed
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "tagged")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_revision(package) == head
    assert git_revision(installed) is None
    (package / "engine.py").write_text("x = 2\n")
    assert git_revision(package) == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert git_revision(package) is None


def test_the_builder_makes_cells_of_the_version(tmp_path: Path) -> None:
    made = cell(1.0, "token", "greedy", 8, 3)
    assert len(made["all"]["conditional"]) == 8
    write_results(SMALL | {"cells": [made], "experts": None}, tmp_path)
