"""moe_engine: an inference engine for Qwen3-MoE models, built around expert parallelism."""

__version__ = "0.1.0"
