"""specdec: speculative decoding around the MTP head of GLM-4.5-family MoE models."""

import logging
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.config import EngineConfig, SamplingParams, SpeculationParams
    from specdec.engine.async_engine import AsyncEngine, AsyncTokenStream
    from specdec.engine.engine import Engine
    from specdec.engine.outputs import GenerationOutput, StreamChunk, TokenStream
    from specdec.errors import CacheFullError, CheckpointError, ModelError, QueueFullError, SpecdecWarning
    from specdec.metrics.engine import EngineStats

    __version__: str

__all__ = [
    "AsyncEngine",
    "AsyncTokenStream",
    "CacheFullError",
    "CheckpointError",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "GenerationOutput",
    "ModelError",
    "QueueFullError",
    "SamplingParams",
    "SpecdecWarning",
    "SpeculationParams",
    "StreamChunk",
    "TokenStream",
    "__version__",
]

_MODULES = {
    "specdec.engine.async_engine": ("AsyncEngine", "AsyncTokenStream"),
    "specdec.config": ("EngineConfig", "SamplingParams", "SpeculationParams"),
    "specdec.engine.engine": ("Engine",),
    "specdec.metrics.engine": ("EngineStats",),
    "specdec.errors": ("CacheFullError", "CheckpointError", "ModelError", "QueueFullError", "SpecdecWarning"),
    "specdec.engine.outputs": ("GenerationOutput", "StreamChunk", "TokenStream"),
}

logging.getLogger("specdec").addHandler(logging.NullHandler())  # what is logged goes nowhere until somebody asks for it


def __getattr__(name: str) -> Any:
    """Imports torch only when something that needs it is asked for, so that the command line starts at once."""
    if name == "__version__":
        return version("specdec-mtp")  # the distribution's name: "specdec" on PyPI is another project
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'specdec' has no attribute {name!r}")
