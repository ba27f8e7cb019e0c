"""The training text of the bundled checkpoint: the Python standard library's own source.

Every `.py` file below the standard library's folder, less generated tables, is one document. A
document is *held out*, and seen by no training step, when the SHA-256 of its module path falls
into one bucket of twenty (about 5 %).
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_BUCKETS = 20
# Tables rather than prose or code: predicting them says nothing about a language model.
EXCLUDED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data")
EXCLUDED_FILES = ("lib2to3/tests/data", "test/cjkencodings", "test/decimaltestdata", "_sysconfigdata")
MAX_FILE_BYTES = 400_000


@dataclass(frozen=True)
class Document:
    """One source file of the standard library."""

    name: str
    """Its path below the standard library, with forward slashes."""
    text: str
    """Its content."""

    @property
    def held_out(self) -> bool:
        """Whether no training step sees it."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_BUCKETS == 0

    @property
    def kind(self) -> str:
        """`test` for the library's own test-suite, `package` or `module` for the library proper."""
        parts = self.name.split("/")
        if "test" in parts or "tests" in parts or parts[-1].startswith("test_"):
            return "test"
        return "package" if len(parts) > 1 else "module"


def load_documents(root: Path | None = None) -> list[Document]:
    """Returns all documents below `root` (default: this interpreter's standard library), sorted by name. Raises
    ValueError where there is none."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(folder in name.split("/") for folder in EXCLUDED_FOLDERS):
            continue
        if any(name.startswith(prefix) for prefix in EXCLUDED_FILES):
            continue
        if path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # test-suite files in deliberately odd encodings
            continue
        if text.strip():
            documents.append(Document(name, text))
    if not documents:
        raise ValueError(f"no Python source below {root}: give the standard library's folder")
    return documents
