"""The checkpoint and the prompts of the CPU benchmark: random, and the same on every run.

The model has the shape of Qwen3-MoE in small: large enough that computing it takes most of the
time, small enough that two cores are done in minutes.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_engine.demo

SEED = 0
MODEL: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    # Wide enough that the best token stands clear of the second: the outputs can be compared.
    "initializer_range": 0.06,
    "eos_token_id": None,
}
MIN_PROMPT_LEN, MAX_PROMPT_LEN = 16, 128
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def save_checkpoint(directory: Path) -> None:
    """Write random float32 weights, and the demo's tokenizer, which the engine asks for."""
    torch.manual_seed(SEED)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**MODEL)).save_pretrained(directory)
    data = Path(moe_engine.demo.__file__).parent / "data"
    for name in TOKENIZER_FILES:
        shutil.copy(data / name, directory)


def make_prompts(num_prompts: int) -> list[list[int]]:
    """Random token ids; lengths are uniform in [MIN_PROMPT_LEN, MAX_PROMPT_LEN]."""
    choose = random.Random(SEED)
    return [
        [
            choose.randrange(MODEL["vocab_size"])
            for _ in range(choose.randint(MIN_PROMPT_LEN, MAX_PROMPT_LEN))
        ]
        for _ in range(num_prompts)
    ]


def total_parameters() -> int:
    """Weights of the model, embedding and head included."""
    return _parameters(MODEL["num_experts"]) + MODEL["vocab_size"] * MODEL["hidden_size"]


def active_parameters() -> int:
    """Weights that one token is multiplied with: attention, router, its experts and the head."""
    return _parameters(MODEL["num_experts_per_tok"])


def _parameters(num_experts: int) -> int:
    """Weights of all matrices but the embedding, with ``num_experts`` experts per layer."""
    hidden, head_dim = MODEL["hidden_size"], MODEL["head_dim"]
    heads, kv_heads = MODEL["num_attention_heads"], MODEL["num_key_value_heads"]
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    router = hidden * MODEL["num_experts"]
    experts = num_experts * 3 * hidden * MODEL["moe_intermediate_size"]
    head = MODEL["vocab_size"] * hidden
    return int(MODEL["num_hidden_layers"] * (attention + router + experts) + head)
