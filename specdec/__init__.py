"""specdec: speculative decoding around the MTP head of GLM-4.5-family MoE models."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.async_engine import AsyncEngine, AsyncTokenStream
    from specdec.config import EngineConfig, SamplingParams, SpeculationParams
    from specdec.engine import Engine
    from specdec.engine_stats import EngineStats
    from specdec.errors import CacheFullError, ModelError, QueueFullError, SpecdecWarning
    from specdec.model.errors import CheckpointError
    from specdec.outputs import GenerationOutput, StreamChunk, TokenStream

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
    "specdec.async_engine": ("AsyncEngine", "AsyncTokenStream"),
    "specdec.config": ("EngineConfig", "SamplingParams", "SpeculationParams"),
    "specdec.engine": ("Engine",),
    "specdec.engine_stats": ("EngineStats",),
    "specdec.errors": ("CacheFullError", "ModelError", "QueueFullError", "SpecdecWarning"),
    "specdec.model.errors": ("CheckpointError",),
    "specdec.outputs": ("GenerationOutput", "StreamChunk", "TokenStream"),
}


def __getattr__(name: str) -> Any:
    """Imports torch only when something that needs it is asked for, so that the command line starts at once."""
    if name == "__version__":
        return version("specdec-mtp")  # the distribution's name: "specdec" on PyPI is another project
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'specdec' has no attribute {name!r}")
