"""Writes files that are there complete or not at all, and JSON without NaN and infinity."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file beside `path` to write to, which takes its place at the end: whoever reads it, also after a kill,
    sees the old content or the new. Where writing fails the old one stays."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file's content, all of it or nothing.

    Text is UTF-8; halves of surrogate pairs, which JSON allows and UTF-8 does not, become "?".
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode("utf-8", errors="replace") if isinstance(content, str) else content)


def finite(value: Any) -> Any:
    """Returns a copy in lists and dicts, with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
