"""Tiny qwen3_moe checkpoints, written by transformers, for the checkpoint tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_engine.checkpoint import WeightSpec, checkpoint_tensors
from moe_engine.config import ModelConfig

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "moe_intermediate_size": 10,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
}


def save_tiny(
    directory: Path,
    *,
    fused: bool = False,
    shard_size: str = "6KB",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Qwen3MoeForCausalLM:
    """Save a random model (biases and norms random too) and return it."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(TINY | changes))).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(directory, save_original_format=not fused, max_shard_size=shard_size)
    return model


def reference_tensors(model: Qwen3MoeForCausalLM) -> dict[str, torch.Tensor]:
    """Per-expert name -> tensor, taken from the model's own parameters."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate
                tensors[f"{prefix}.{expert}.up_proj.weight"] = up
        elif prefix.endswith("experts") and last == "down_proj":
            for expert, down in enumerate(tensor):
                tensors[f"{prefix}.{expert}.down_proj.weight"] = down
        else:
            tensors[name] = tensor
    return tensors


def whole_specs(config: ModelConfig, dtype: torch.dtype = torch.float32) -> list[WeightSpec]:
    """Specs that read every tensor of a checkpoint in full."""
    return [
        WeightSpec(name, tuple(slice(0, size) for size in shape), torch.empty(shape, dtype=dtype))
        for name, shape in checkpoint_tensors(config).items()
    ]


def shard_of(directory: Path, name: str) -> Path:
    """The file that holds ``name``, by the index."""
    return directory / read_index(directory)[name]


def read_index(directory: Path) -> dict[str, str]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return index["weight_map"]


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_file(file: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a safetensors file."""
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
