"""moe_engine: an inference engine for Qwen3-MoE models, built around expert parallelism.

    from moe_engine import MoEEngine, SamplingParams

The names below are imported when they are first used, so that ``import moe_engine`` needs neither
PyTorch nor a GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_engine.engine.async_llm import AsyncMoEEngine
    from moe_engine.engine.llm import MoEEngine
    from moe_engine.errors import (
        CheckpointError,
        ConfigError,
        EngineDeadError,
        InvalidRequestError,
        MoEEngineError,
    )
    from moe_engine.types.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "AsyncMoEEngine",
    "CheckpointError",
    "ConfigError",
    "EngineDeadError",
    "InvalidRequestError",
    "MoEEngine",
    "MoEEngineError",
    "SamplingParams",
    "__version__",
]

_DEFINED_IN = {
    "AsyncMoEEngine": "moe_engine.engine.async_llm",
    "CheckpointError": "moe_engine.errors",
    "ConfigError": "moe_engine.errors",
    "EngineDeadError": "moe_engine.errors",
    "InvalidRequestError": "moe_engine.errors",
    "MoEEngine": "moe_engine.engine.llm",
    "MoEEngineError": "moe_engine.errors",
    "SamplingParams": "moe_engine.types.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_DEFINED_IN[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_DEFINED_IN})
