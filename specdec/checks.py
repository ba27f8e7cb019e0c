"""Checks what users give: a ValueError says the name, the value and the limit."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, ClassVar, Self


def require(condition: bool, message: str) -> None:
    """Raises ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def is_integer(value: Any) -> bool:
    """Returns whether it is an integer, Python's or NumPy's; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_int(name: str, value: Any, low: int | None = None, high: int | None = None, remedy: str = "") -> None:
    """Raises ValueError unless a value is an integer within limits.

    name: what the message calls it.
    value: Python's integer or NumPy's; a bool is none.
    low, high: limits, themselves allowed; None for no limit.
    remedy: what the message ends with.
    """
    limits = "" if low is None else f", at least {low}" if high is None else f", from {low} to {high}"
    inside = is_integer(value) and (low is None or value >= low) and (high is None or value <= high)
    require(inside, f"{name} = {value!r} must be an integer{limits}{remedy}")


def is_number(value: Any) -> bool:
    """Returns whether it is a finite number; a bool is none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def require_number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raises ValueError unless a value is a finite number from low to high. open_low: low itself is not allowed."""
    inside = is_number(value) and (low < value if open_low else low <= value) and value <= high
    if math.isfinite(high):
        limits = f"in {'(' if open_low else '['}{low:g}, {high:g}]"
    else:
        limits = f"a finite number, {'above' if open_low else 'at least'} {low:g}"
    require(inside, f"{name} = {value!r} must be {limits}")


def require_bool(name: str, value: Any) -> None:
    """Raises ValueError unless a value is True or False."""
    require(isinstance(value, bool), f"{name} = {value!r} must be True or False")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless a value is one of the choices."""
    require(value in choices, f"{name} = {value!r} is unknown: choose one of {', '.join(choices)}")


def require_keywords(owner: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises TypeError for a keyword that is not known, naming those near to it.

    owner: what the message says was called.
    given: the keywords of the call.
    known: the keywords that there are.
    """
    for name in given:
        if name not in known:
            near = " or ".join(difflib.get_close_matches(name, known, n=2, cutoff=0.5))
            hint = f": do you mean {near}?" if near else "."
            raise TypeError(f"{owner} got an unexpected keyword argument {name!r}{hint} It takes {', '.join(known)}")


class ChecksKeywords:
    """A base of dataclasses: their constructors name the fields that are near to an unknown one."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __new__(cls, *_: Any, **given: Any) -> Self:
        require_keywords(f"{cls.__name__}()", given, [field.name for field in fields(cls)])
        return super().__new__(cls)
