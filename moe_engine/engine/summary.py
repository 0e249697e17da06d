"""What a user sees once the engine is up: layout and memory in a few lines."""

from __future__ import annotations

from moe_engine.engine.memory import size
from moe_engine.engine.runtime import RankRuntime
from moe_engine.engine.startup import describe_startup
from moe_engine.types.messages import MemoryLedger


def start_summary(runtime: RankRuntime, num_blocks: int) -> str:
    """Layout, weights and KV cache per rank, and where the start's time went."""
    model, config = runtime.model_config, runtime.config
    parallel = config.parallel
    tokens = num_blocks * config.cache.block_size
    dtype = str(runtime.dtype).removeprefix("torch.")
    lines = [
        f"model     {config.model} ({model.num_hidden_layers} layers, "
        f"{model.num_experts} experts, top {model.num_experts_per_tok}, {dtype})",
        f"layout    {parallel.world_size} rank(s) on {runtime.device.type}: attention TP "
        f"{parallel.attention_tp} x DP {parallel.attention_dp}, experts EP "
        f"{parallel.world_size}",
        *memory_lines(runtime.ledger),
        f"KV cache  {num_blocks} blocks of {config.cache.block_size} = {tokens} tokens per "
        f"DP group; context {runtime.max_model_len} tokens",
    ]
    if runtime.device.type == "cuda":
        graphs = "CUDA graphs" if runtime.uses_graphs else "no CUDA graphs"
        lines.append(f"steps     up to {runtime.pipeline_depth} under way, {graphs}")
    lines.append(f"start     {describe_startup(runtime.clock.seconds)}")
    return "\n".join(lines)


def memory_lines(ledger: MemoryLedger) -> list[str]:
    """The ledger in words; a CPU's knows weights and KV cache only."""
    lines = [
        f"memory    per rank: weights {size(ledger.weights)}, KV cache {size(ledger.kv_cache)}"
    ]
    if ledger.total:
        graphs, reserved = size(ledger.graphs), size(ledger.graphs_reserved)
        if ledger.exchange:
            lines[0] += f", exchange {size(ledger.exchange)}"
        lines += [
            f"          CUDA graphs {graphs} ({reserved} reserved), free {size(ledger.free)}, "
            f"of which steps take up to {size(ledger.activations)}",
            f"          of {size(ledger.total)}, {size(ledger.at_start)} of it taken before",
        ]
    return lines
