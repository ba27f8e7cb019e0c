"""Writes sizes as people read them."""

from __future__ import annotations


def size_text(num_bytes: int) -> str:
    """Returns a number of bytes in the unit that suits it, for instance "24.42 MiB"."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
