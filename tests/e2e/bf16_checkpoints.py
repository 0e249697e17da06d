"""Random bfloat16 checkpoints on which the loss of precision can be judged.

Independent normal weights make a poor judge of a bfloat16 engine, for two reasons that trained
models do not share; each has its answer in the weights here.

- The two best of V independent logits lie so close that results rounded correctly disagree with
  float32 on the best in some 2 of 100 positions, however the logits are scaled. A trained model is
  sure of most of its tokens. So a part of the output head is the embedding, shifted by one: every
  token makes the next id likely, `PEAK` standard deviations above the rest before the layers blur
  it, and the layers decide what the margin is, or sometimes another token.
- Where the K-th and the next expert are as likely and as heavy as the best, rounding swaps them and
  the output jumps. A trained router prefers few experts, and the last of them weighs little: the
  router's logits have a standard deviation of about `ROUTER_GAIN`.

Shape legend: H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PEAK = 12.0
ROUTER_GAIN = 3.0
# Makes up for the average over a context, so that the layers change as much as they keep.
ATTENTION_GAIN = 2.0
LOGIT_STD = 3.0

BASE = {
    "num_hidden_layers": 4,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


@dataclass(frozen=True)
class Variant:
    """A checkpoint: options of its config beyond `BASE`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return self.options["vocab_size"]


# Sizes that the Hopper kernels take: all of them with the first, and with the second the stages of
# half the depth and the library's linear layers.
LARGE = (
    Variant(
        "normalised",
        {
            "vocab_size": 4000,
            "hidden_size": 1024,
            "moe_intermediate_size": 256,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
        },
    ),
    Variant(
        "unnormalised-biased",
        {
            "vocab_size": 1003,
            "hidden_size": 576,
            "moe_intermediate_size": 192,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "attention_bias": True,
        },
    ),
)
# The same two in little, for CPUs.
SMALL = tuple(
    Variant(
        variant.name,
        variant.options
        | {
            "vocab_size": 500,
            "hidden_size": 256,
            "moe_intermediate_size": 64,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 32,
        },
    )
    for variant in LARGE
)


def save_checkpoint(directory: Path, variant: Variant, seed: int) -> None:
    """Write the checkpoint, whose weights are bfloat16 for everybody, float32 references too."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    options = {**BASE, **variant.options}
    options["intermediate_size"] = 2 * options["moe_intermediate_size"]
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.1)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif "embed_tokens" in name:
                parameter.normal_()
            else:
                parameter.normal_(std=_gain(name) / parameter.shape[-1] ** 0.5)
        _predict_the_next_id(model.lm_head.weight, model.model.embed_tokens.weight)
    model.to(torch.bfloat16).save_pretrained(directory)


def _gain(name: str) -> float:
    """Standard deviation of a projection's output, for inputs of 1."""
    if name.endswith("mlp.gate.weight"):
        return ROUTER_GAIN
    return ATTENTION_GAIN if "o_proj" in name else 1.0


def _predict_the_next_id(head_VH: torch.Tensor, embedding_VH: torch.Tensor) -> None:
    """Mix the shifted embedding into the head's independent rows, of a standard deviation 1."""
    hidden = head_VH.shape[1]
    share = PEAK / hidden**0.5
    own = (1 - share**2) ** 0.5
    head_VH.mul_(own).add_(embedding_VH.roll(1, dims=0), alpha=share / hidden**0.5)
    head_VH.mul_(LOGIT_STD)
