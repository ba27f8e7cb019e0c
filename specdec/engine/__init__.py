"""The front doors, `Engine` and `AsyncEngine`, and what turns a prompt into a sequence and a sequence into output."""

from specdec.engine.async_engine import AsyncEngine, AsyncTokenStream
from specdec.engine.engine import Engine

__all__ = ["AsyncEngine", "AsyncTokenStream", "Engine"]
