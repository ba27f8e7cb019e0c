"""Errors of the engine that are not plain ValueErrors, and its warning."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from specdec.kernels.errors import KernelsUnavailableError, SpecdecWarning

__all__ = [
    "CacheFullError",
    "KernelsUnavailableError",
    "ModelError",
    "NotEnoughMemoryError",
    "QueueFullError",
    "RowsError",
    "SpecdecWarning",
]


class CacheFullError(RuntimeError):
    """A request that could never fit into the KV cache, however long it waited."""


class NotEnoughMemoryError(ValueError):
    """Weights and cache do not fit into the machine's memory."""


class ModelError(RuntimeError):
    """The model computed something that cannot be used."""

    @classmethod
    def not_finite(cls, whose: str) -> ModelError:
        return cls(f"{whose}'s logits are not finite: its weights are broken, or its dtype overflows")


class QueueFullError(RuntimeError):
    """A request that was refused because too many wait already."""


class RowsError(Exception):
    """A stage failed with `error` for some of its scheduled sequences, by their places in the step, and only for them:
    the others are as they were before the stage, or complete."""

    def __init__(self, rows: Seq[int], error: Exception) -> None:
        super().__init__(str(error))
        self.rows, self.error = rows, error
