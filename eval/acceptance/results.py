"""Writes results.json whole, and checks it when it is read. docs/results.md describes every field."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from specdec import Engine, __version__
from specdec.eval.acceptance.schema import SCHEMA, VERSION, faults
from specdec.eval.files import finite, write_whole
from specdec.eval.machine import describe_machine, git_revision
from specdec.model.weights import CheckpointIndex

RESULTS_NAME = "results.json"
NUMBERS = re.compile(r"\[\n((?: +[-+.\de]+,?\n)+) +\]")  # a list of numbers, one a line; no string has line ends
REMEDY = "make it anew with `specdec eval acceptance`"


def write_results(document: dict[str, Any], folder: Path) -> Path:
    """Writes results.json, with null for numbers that are not finite, and returns its path. Raises ValueError where the
    document is not one of `VERSION`, so that what is written can be read."""
    path = folder / RESULTS_NAME
    document = finite(document)
    _check(document, path)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2, allow_nan=False)
    write_whole(path, NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")
    return path


def read_results(path: Path | str) -> dict[str, Any]:
    """Returns the document of a results.json, given the file or its folder. Raises ValueError naming the file, the
    fault, the remedy."""
    path = Path(path)
    path = path / RESULTS_NAME if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} does not exist: give a {RESULTS_NAME} of `specdec eval acceptance`, or its folder"
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # of JSON, of UTF-8
        raise ValueError(f"{path} is not JSON ({error}): {REMEDY}") from error
    _check(document, path)
    checked: dict[str, Any] = document
    return checked


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")


def _check(document: Any, path: Path) -> None:
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r:.60}, not {SCHEMA!r}: {REMEDY}")
    number = document.get("version")
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{path} has version {number!r:.60}, which must be an integer from 1 to {VERSION}: {REMEDY}")
    if number > VERSION:
        raise ValueError(
            f"{path} has version {number} of the schema, this specdec ({__version__}) reads up to {VERSION}: "
            "upgrade specdec"
        )
    found = list(faults(document))
    if found:
        more = f" (and {len(found) - 1} faults more)" if len(found) > 1 else ""
        raise ValueError(f"{path}: {found[0]}{more}: {REMEDY}")


def utc_now() -> str:
    """Returns the time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def provenance(engine: Engine, command: str, started: str, *, sha256: str | None = None) -> dict[str, Any]:
    """Returns what was measured, on what, by what; `finished` is now.

    engine: the one that was measured.
    command: as typed.
    started: what `utc_now` returned at the beginning.
    sha256: what `checkpoint_sha256` returns, where it is known already.
    """
    index, machine = engine.checkpoint.index, describe_machine(engine)
    return {
        "specdec": __version__,
        "git_revision": git_revision(),
        "checkpoint": {"folder": str(index.folder), "sha256": sha256 or checkpoint_sha256(index)},
        "python": platform.python_version(),
        "torch": machine["torch"],
        "numpy": version("numpy"),
        "processor": machine["processor"],
        "threads": machine["threads"],
        "kernels": machine["kernels"],
        "weights": machine["weights"],
        "command": command,
        "started": started,
        "finished": utc_now(),
    }


def checkpoint_sha256(index: CheckpointIndex) -> str:
    """Returns one hash of config.json and all weight files: that of the lines that `sha256sum` prints of them.

    In the folder: `LC_ALL=C sha256sum config.json *.safetensors | sha256sum`. Reads every byte of the checkpoint.
    """
    weights = sorted(set(index.tensors.values()), key=lambda path: path.name)
    lines = []
    for path in (index.folder / "config.json", *weights):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
