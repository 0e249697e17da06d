"""The least that a decode step has to read, and what follows from it.

Letters: B sequences, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_engine.config import EngineConfig, ModelConfig
from moe_engine.engine.memory import weight_bytes


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that one decode step reads at least, on one rank that holds the whole model.

    Attributes:
        experts: weights of the experts that are hit in expectation.
        dense: attention, routers, norms, dense layers, output head, rows of the embedding.
        kv: keys and values of the contexts.
    """

    experts: float
    dense: float
    kv: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.experts + self.dense + self.kv


def expected_experts_hit(popularity: Sequence[float], batch: int) -> float:
    """Experts that at least one of ``batch`` tokens chooses, in expectation.

    Args:
        popularity: the share of tokens that choose each expert, independently of one another.

    Example: 128 experts of popularity 8 / 128, 64 tokens: 128 * (1 - (1 - 1/16)^64) = 125.9.
    """
    return sum(1.0 - (1.0 - share) ** batch for share in popularity)


def step_bytes(
    model: ModelConfig, batch: int, context: float, popularity: Sequence[float], item_size: int
) -> StepBytes:
    """What a decode step of ``batch`` sequences reads.

    Args:
        context: tokens in the cache per sequence, on average.
        popularity: see `expected_experts_hit`.
        item_size: bytes of a weight and of an element of the cache.
    """
    hidden, num_layers = model.hidden_size, model.num_hidden_layers
    kv_width = model.num_key_value_heads * model.head_dim
    num_moe = sum(model.is_moe_layer(layer) for layer in range(num_layers))
    expert = 3 * hidden * model.moe_intermediate_size
    # Bytes of a type of one byte: elements. All of them but the experts and, of an embedding that
    # is not the output head as well, all rows but the batch's.
    dense = weight_bytes(model, EngineConfig(), torch.uint8) - num_moe * model.num_experts * expert
    if not model.tie_word_embeddings:
        dense -= model.vocab_size * hidden
    dense += batch * hidden
    return StepBytes(
        experts=num_moe * expected_experts_hit(popularity, batch) * expert * item_size,
        dense=dense * item_size,
        kv=batch * context * 2 * num_layers * kv_width * item_size,
    )


def slope(first: tuple[int, float], second: tuple[int, float]) -> float:
    """Seconds a unit, from two (number of units, seconds): what both have in common cancels.

    Example: 129 tokens in 1.5 s and 257 in 2.78 s: 0.01 s a token.
    """
    (few, short), (many, long) = first, second
    assert many > few, (few, many)
    return (long - short) / (many - few)
