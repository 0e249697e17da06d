"""How much memory a rank needs and has; all arithmetic, refused before anything is allocated.

Units are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_engine.cache.kv import kv_bytes_per_block
from moe_engine.config import EngineConfig, ModelConfig
from moe_engine.config.engine import GIB
from moe_engine.errors import ConfigError
from moe_engine.layers.attention import local_kv_heads

CPU_KV_CACHE_BYTES = GIB
"""KV cache of a CPU rank when nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class KVBudget:
    """What the KV cache of one rank may take.

    Attributes:
        block_bytes: bytes of one block on this rank.
        available: bytes that the cache may take at most.
        source: where ``available`` comes from, in words, for error messages.
    """

    block_bytes: int
    available: int
    source: str


def weight_bytes(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> int:
    """Bytes of one rank's weights (the largest shard)."""
    tp, world = config.parallel.attention_tp, config.parallel.world_size
    hidden, head_dim = model.hidden_size, model.head_dim
    q_width = model.num_attention_heads // tp * head_dim
    kv_width = len(local_kv_heads(model, tp, 0)) * head_dim
    attention = hidden * (2 * q_width + 2 * kv_width) + 2 * (hidden + head_dim)
    if model.attention_bias:
        attention += q_width + 2 * kv_width + hidden
    experts = model.num_experts // world * 3 * hidden * model.moe_intermediate_size
    moe = experts + model.num_experts * hidden
    dense = 3 * hidden * model.intermediate_size // tp
    num_moe = sum(model.is_moe_layer(layer) for layer in range(model.num_hidden_layers))
    vocabularies = 1 if model.tie_word_embeddings else 2
    vocabulary = vocabularies * -(-model.vocab_size // tp) * hidden
    num_dense = model.num_hidden_layers - num_moe
    elements = model.num_hidden_layers * attention + num_moe * moe + num_dense * dense
    return (elements + vocabulary + hidden) * dtype.itemsize


def check_weights_fit(needed: int, free: int, world_on_node: int) -> None:
    """Raise `ConfigError` if the weights of this node's ranks exceed the free memory.

    Args:
        needed: bytes of one rank's weights.
        free: bytes free to ``world_on_node`` ranks together.
        world_on_node: ranks that share the memory.
    """
    if needed * world_on_node > free:
        raise ConfigError(
            "too little memory for the weights: "
            f"{world_on_node} rank{'s' * (world_on_node > 1)} x {size(needed)} = "
            f"{size(needed * world_on_node)}, but {size(free)} are free; use more ranks on more "
            "devices or a smaller dtype"
        )


def kv_budget(
    model: ModelConfig,
    config: EngineConfig,
    dtype: torch.dtype,
    free: int,
    total: int,
    working: int = 0,
) -> KVBudget:
    """What the KV cache of one rank may take, the weights being loaded.

    Args:
        free: bytes free to this rank now.
        total: bytes of the device, for ``memory_utilization``; 0 on a CPU.
        working: bytes that steps will take besides: activations and CUDA graphs.
    """
    cache = config.cache
    heads = len(local_kv_heads(model, config.parallel.attention_tp, 0))
    block_bytes = kv_bytes_per_block(
        model.num_hidden_layers, cache.block_size, heads, model.head_dim, dtype
    )
    if cache.kv_cache_memory is not None:
        available, source = cache.kv_cache_memory, "kv_cache_memory"
    elif total:
        available = free - int(total * (1.0 - cache.memory_utilization)) - working
        source = (
            f"{size(free)} free less {1 - cache.memory_utilization:.0%} of {size(total)} "
            f"and {size(working)} for activations and graphs"
        )
    else:
        available, source = min(CPU_KV_CACHE_BYTES, free // 2), "the default of a CPU rank"
    if available > free - working:
        less = f" and steps need {size(working)}" if working else ""
        raise ConfigError(
            f"the KV cache may take {size(available)} ({source}), but {size(free)} are free{less}"
        )
    return KVBudget(block_bytes, available, source)


def choose_num_blocks(budget: KVBudget, config: EngineConfig, max_model_len: int) -> int:
    """KV blocks of this rank: what was asked for, or all that fit, but no more than can be used.

    Raises:
        ConfigError: with the arithmetic, when the blocks asked for or one sequence of the
            configured ``max_model_len`` do not fit.
    """
    cache = config.cache
    fit = max(budget.available, 0) // budget.block_bytes
    arithmetic = (
        f"{size(budget.available)} ({budget.source}) / {budget.block_bytes} bytes a block "
        f"= {fit} blocks of {cache.block_size} tokens"
    )
    if cache.num_blocks is not None:
        if cache.num_blocks > fit:
            raise ConfigError(
                f"too little memory for num_blocks = {cache.num_blocks}: {arithmetic}"
            )
        return cache.num_blocks
    per_sequence = -(-max_model_len // cache.block_size)
    least = per_sequence if config.scheduler.max_model_len is not None else 1
    if fit < least:
        raise ConfigError(
            f"too little memory for the KV cache: one sequence of {max_model_len} tokens takes "
            f"{per_sequence} blocks, but {arithmetic}; lower max_model_len or raise "
            "kv_cache_memory"
        )
    return min(fit, per_sequence * config.scheduler.max_num_seqs)


def size(num_bytes: int) -> str:
    """A size for people, e.g. ``1.50 GiB`` or ``20.00 MiB``."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if abs(num_bytes) >= 1 << power:
            return f"{num_bytes / (1 << power):.2f} {unit}"
    return f"{num_bytes / (1 << 10):.2f} KiB"
