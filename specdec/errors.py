"""Every error that specdec raises on purpose, apart from plain ValueErrors about arguments, and its warning.

    SpecdecError
     +-- CheckpointError          a checkpoint cannot be used as it is
     +-- KernelsUnavailableError  (also a RuntimeError) the backend cannot run here
     +-- NotEnoughMemoryError     (also a ValueError) weights and cache do not fit
     +-- CacheFullError           (also a RuntimeError) a request could never fit into the KV cache
     +-- QueueFullError           (also a RuntimeError) too many requests wait already
     +-- EngineInUseError         (also a RuntimeError) another call of the engine is under way
     +-- ModelError               (also a RuntimeError) the model computed nonsense
     +-- DrafterError             (also a ValueError) a drafter of the user's own proposed what cannot be drafts
    SpecdecWarning                (a UserWarning) something works, but not as expected

A ValueError about an argument names the value, the limit and the remedy. `RowsError` never reaches a user: it carries
the error of a stage to the engine.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence as Seq
from typing import ClassVar


class SpecdecError(Exception):
    """Base of all errors of specdec."""

    exit_code: ClassVar[int] = 1
    """Exit code of the command line after this error."""


class CheckpointError(SpecdecError):
    """A checkpoint cannot be used as it is: the message names the file or tensor and the remedy."""


class KernelsUnavailableError(SpecdecError, RuntimeError):
    """The backend that was asked for cannot run here; the message says what is missing."""


class NotEnoughMemoryError(SpecdecError, ValueError):
    """Weights and cache do not fit into the machine's memory."""


class CacheFullError(SpecdecError, RuntimeError):
    """A request could never fit into the KV cache, however long it waited."""


class QueueFullError(SpecdecError, RuntimeError):
    """A request was refused because too many wait already."""


class EngineInUseError(SpecdecError, RuntimeError):
    """An engine was called while another call of it was under way, or in a process that it was not made in."""


class ModelError(SpecdecError, RuntimeError):
    """The model computed something that cannot be used."""

    @classmethod
    def not_finite(cls, whose: str) -> ModelError:
        """Returns the error of logits that are not finite. whose: "the target" or "the MTP layer"."""
        return cls(f"{whose}'s logits are not finite: its weights are broken, or its dtype overflows")


class DrafterError(SpecdecError, ValueError):
    """A drafter of the user's own proposed what cannot be drafts."""


class RowsError(Exception):
    """A stage failed with `error` for some of its scheduled sequences, by their places in the step, and only for them:
    the others are as they were before the stage, or complete."""

    def __init__(self, rows: Seq[int], error: Exception) -> None:
        """rows: places of the sequences in the step. error: what failed."""
        super().__init__(str(error))
        self.rows, self.error = rows, error


class SpecdecWarning(UserWarning):
    """Something works, but not as a user would expect."""


def warn(message: str) -> None:
    """Issues a SpecdecWarning that points at the user's line: the innermost one that is not in this package."""
    frame, depth = sys._getframe(1), 2  # warnings.warn counts from this function, which is 1
    while frame.f_globals.get("__name__", "").partition(".")[0] == "specdec" and frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, SpecdecWarning, stacklevel=depth)
