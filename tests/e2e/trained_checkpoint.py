"""A model that has learnt something, within seconds, for tests that random weights cannot serve.

It learns a language of two rules: the next token is most often a fixed function of the token before
the last, for which attention has to look back, and otherwise one of the last. Its margins, its
routing and its activations are those that training leads to.

Shape legend: N sequences, L tokens of a sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 128
USUAL = 0.9
"""How often the first rule decides."""
BATCH, LENGTH = 8, 64
BASE = {
    "vocab_size": VOCAB_SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
SMALL = BASE | {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "head_dim": 32,
    "num_experts": 8,
}
# Sizes that the Hopper kernels take.
LARGE = BASE | {
    "hidden_size": 512,
    "moe_intermediate_size": 128,
    "head_dim": 128,
    "num_experts": 16,
}


def speak(num_sequences: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Sequences of the language, int64 [N, L]."""
    rules = torch.Generator().manual_seed(7)
    after_previous, after_last = (torch.randperm(VOCAB_SIZE, generator=rules) for _ in range(2))
    tokens = list(torch.randint(VOCAB_SIZE, (2, num_sequences), generator=generator))
    while len(tokens) < length:
        is_usual = torch.rand(num_sequences, generator=generator) < USUAL
        tokens.append(torch.where(is_usual, after_previous[tokens[-2]], after_last[tokens[-1]]))
    return torch.stack(tokens, dim=1)


def train_checkpoint(
    directory: Path, options: dict[str, Any], device: str, *, num_steps: int, rate: float
) -> None:
    """Train a model from random weights and write it as bfloat16.

    Args:
        rate: AdamW's learning rate, after a start from 0 and before it falls to 0 again.
    """
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = Qwen3MoeConfig(
        **options,
        intermediate_size=2 * options["moe_intermediate_size"],
        output_router_logits=True,  # adds the loss that keeps the experts' load even
        router_aux_loss_coef=0.01,
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / num_steps)
    )
    for _ in range(num_steps):
        tokens_NL = speak(BATCH, LENGTH, generator).to(device)
        model(tokens_NL, labels=tokens_NL).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(directory)
