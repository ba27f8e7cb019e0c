"""Reports how far something is that takes seconds. What becomes of that, for instance a progress bar, is for the caller
to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

Progress = Callable[[str, int, int], None]
"""A function (what is being done, how much of it is done, of how much), called in the thread that does it: first with
nothing done, last with all of it. A total of 1 is a task whose parts are not known."""


def silent(what: str, done: int, total: int) -> None:
    """Ignores what it is told: the `Progress` of those who want none."""


def tracked(items: Sequence[Item], what: str, progress: Progress) -> Iterator[Item]:
    """Yields the items; `progress` hears of each before it is worked on, and of the end."""
    for done, item in enumerate(items):
        progress(what, done, len(items))
        yield item
    progress(what, len(items), len(items))


def as_text(what: str, done: int, total: int) -> str:
    """Returns what a `Progress` hears as one line, for instance "loading weights: 40 %"."""
    return what if total == 1 else f"{what}: {100 * done // total} %"
