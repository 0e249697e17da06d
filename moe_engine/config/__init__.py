"""Configuration as frozen dataclasses: the engine's, the server's, and the model's own."""

from moe_engine.config.engine import (
    CacheConfig,
    ClusterConfig,
    EngineConfig,
    ExchangeConfig,
    ParallelConfig,
    SchedulerConfig,
    ServerConfig,
)
from moe_engine.config.model import ModelConfig, RopeConfig

__all__ = [
    "CacheConfig",
    "ClusterConfig",
    "EngineConfig",
    "ExchangeConfig",
    "ModelConfig",
    "ParallelConfig",
    "RopeConfig",
    "SchedulerConfig",
    "ServerConfig",
]
