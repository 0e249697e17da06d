"""Random checkpoints in several shapes and formats, and what transformers says of them."""

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import moe_engine.demo

DEMO_DATA = Path(moe_engine.demo.__file__).parent / "data"
PROMPT_LENGTHS = (1, 3, 7, 16, 33, 50)
NUM_NEW_TOKENS = 64

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.15,
    "eos_token_id": 255,
}


@dataclass(frozen=True)
class Variant:
    """A checkpoint: options of its config, and how it is saved."""

    name: str
    options: dict[str, Any]
    save: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


VARIANTS = (
    Variant("sharded", {}, {"max_shard_size": "100KB"}),
    Variant(
        "fused-tied-odd-vocabulary",
        {
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "num_key_value_heads": 2,
            "vocab_size": 251,
            "eos_token_id": 250,
        },
        {"save_original_format": False},
    ),
    Variant(
        "every-second-layer-sparse-biased",
        {"decoder_sparse_step": 2, "num_hidden_layers": 4, "attention_bias": True},
    ),
    Variant(
        "some-layers-dense-yarn",
        {
            "mlp_only_layers": [0, 2],
            "num_hidden_layers": 3,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
        {"save_original_format": False, "max_shard_size": "100KB"},
    ),
    Variant(
        "all-experts-one-kv-head",
        {"num_experts_per_tok": 8, "num_key_value_heads": 1, "eos_token_id": [254, 255]},
    ),
    Variant(
        "sixteen-experts-bfloat16-file",
        {
            "num_experts": 16,
            "num_experts_per_tok": 5,
            "num_key_value_heads": 8,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
        dtype=torch.bfloat16,
    ),
)


@dataclass(frozen=True)
class Reference:
    """A saved checkpoint and transformers' answers in float32.

    Attributes:
        prompts: token ids.
        logits: per prompt, [len(prompt) + NUM_NEW_TOKENS - 1, vocabulary]: of every position.
        greedy: per prompt, the NUM_NEW_TOKENS tokens of greedy decoding.
    """

    directory: Path
    prompts: list[list[int]]
    logits: list[torch.Tensor]
    greedy: list[list[int]]


def save_checkpoint(directory: Path, variant: Variant, seed: int) -> None:
    """Random weights in transformers' model, saved as ``variant`` says."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**BASE, **variant.options}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.to(variant.dtype).save_pretrained(directory, **variant.save)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_DATA / name, directory)


@torch.inference_mode()
def make_reference(directory: Path, variant: Variant, seed: int) -> Reference:
    """Save the checkpoint and let transformers decode some prompts greedily."""
    from transformers import Qwen3MoeForCausalLM

    save_checkpoint(directory, variant, seed)
    model = Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    choose = random.Random(seed)
    vocab_size = model.config.vocab_size
    prompts = [[choose.randrange(vocab_size) for _ in range(n)] for n in PROMPT_LENGTHS]
    all_logits, all_greedy = [], []
    for prompt in prompts:
        greedy: list[int] = []
        logits = []
        cache = None
        tokens = prompt
        for _ in range(NUM_NEW_TOKENS):
            out = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0])
            tokens = [int(out.logits[0, -1].argmax())]
            greedy += tokens
        all_logits.append(torch.cat(logits))
        all_greedy.append(greedy)
    return Reference(directory, prompts, all_logits, all_greedy)
