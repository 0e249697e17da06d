"""What a user sees once the engine is up: layout and memory in a few lines."""

from __future__ import annotations

from moe_engine.engine.memory import size, weight_bytes
from moe_engine.engine.runtime import RankRuntime
from moe_engine.engine.startup import describe_startup


def start_summary(runtime: RankRuntime, num_blocks: int) -> str:
    """Layout, weights and KV cache per rank, and where the start's time went."""
    model, config = runtime.model_config, runtime.config
    parallel = config.parallel
    tokens = num_blocks * config.cache.block_size
    weights = weight_bytes(model, config, runtime.dtype)
    kv = num_blocks * runtime.budget.block_bytes
    dtype = str(runtime.dtype).removeprefix("torch.")
    return "\n".join(
        (
            f"model     {config.model} ({model.num_hidden_layers} layers, "
            f"{model.num_experts} experts, top {model.num_experts_per_tok}, {dtype})",
            f"layout    {parallel.world_size} rank(s) on {runtime.device.type}: attention TP "
            f"{parallel.attention_tp} x DP {parallel.attention_dp}, experts EP "
            f"{parallel.world_size}",
            f"memory    per rank: weights {size(weights)}, KV cache {size(kv)}",
            f"KV cache  {num_blocks} blocks of {config.cache.block_size} = {tokens} tokens per "
            f"DP group; context {runtime.max_model_len} tokens",
            f"start     {describe_startup(runtime.clock.seconds)}",
        )
    )
