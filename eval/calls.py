"""Watches calls of an object's methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

Method = Callable[..., Any]


@contextmanager
def wrapped(owner: object, name: str, wrap: Callable[[Method], Method]) -> Iterator[None]:
    """Replaces an object's method by `wrap` of it while the context is entered; others of its class keep theirs."""
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        delattr(owner, name)


@contextmanager
def timed_calls(owner: object, *names: str) -> Iterator[list[float]]:
    """Yields a list that receives the seconds of every call of these methods while the context is entered."""
    seconds: list[float] = []

    def timed(method: Method) -> Method:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = method(*arguments)
            seconds.append(time.perf_counter() - start)
            return result

        return call

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(wrapped(owner, name, timed))
        yield seconds
