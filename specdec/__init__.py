"""specdec: speculative decoding around the MTP head of GLM-4.5-family MoE models."""

import logging
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.config import EngineConfig, SamplingParams, SpeculationParams
    from specdec.cost import CostTable, StepTimes
    from specdec.engine.async_engine import AsyncEngine, AsyncTokenStream
    from specdec.engine.engine import Engine
    from specdec.engine.outputs import GenerationOutput, StreamChunk, TokenStream
    from specdec.errors import (
        CacheFullError,
        CheckpointError,
        DrafterError,
        EngineInUseError,
        KernelsUnavailableError,
        ModelError,
        NotEnoughMemoryError,
        QueueFullError,
        SpecdecError,
        SpecdecWarning,
    )
    from specdec.metrics.engine import EngineStats
    from specdec.request.logprobs import TokenLogprobs
    from specdec.request.prompts import Prompt
    from specdec.request.sequence import FinishReason
    from specdec.request.stats import DraftStats, Histogram, RequestStats
    from specdec.step.draft_length import DraftLengthStats
    from specdec.step.drafter import Drafter, DraftRequest

    __version__: str

__all__ = [
    "AsyncEngine",
    "AsyncTokenStream",
    "CacheFullError",
    "CheckpointError",
    "CostTable",
    "DraftLengthStats",
    "DraftRequest",
    "DraftStats",
    "Drafter",
    "DrafterError",
    "Engine",
    "EngineConfig",
    "EngineInUseError",
    "EngineStats",
    "FinishReason",
    "GenerationOutput",
    "Histogram",
    "KernelsUnavailableError",
    "ModelError",
    "NotEnoughMemoryError",
    "Prompt",
    "QueueFullError",
    "RequestStats",
    "SamplingParams",
    "SpecdecError",
    "SpecdecWarning",
    "SpeculationParams",
    "StepTimes",
    "StreamChunk",
    "TokenLogprobs",
    "TokenStream",
    "__version__",
]

_HOMES = (  # of the public names; those that need no torch first
    "specdec.errors",
    "specdec.cost",
    "specdec.config",
    "specdec.request.stats",
    "specdec.request.prompts",
    "specdec.request.logprobs",
    "specdec.request.sequence",
    "specdec.step.draft_length",
    "specdec.step.drafter",
    "specdec.metrics.engine",
    "specdec.engine.outputs",
    "specdec.engine.engine",
    "specdec.engine.async_engine",
)

logging.getLogger("specdec").addHandler(logging.NullHandler())  # what is logged goes nowhere until somebody asks for it


def __getattr__(name: str) -> Any:
    """Imports torch only when something that needs it is asked for, so that the command line starts at once."""
    if name == "__version__":
        return version("specdec-mtp")  # the distribution's name: "specdec" on PyPI is another project
    if name in __all__:
        for module in map(import_module, _HOMES):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'specdec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
