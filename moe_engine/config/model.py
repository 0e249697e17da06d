"""The model's shape, read from a Hugging Face ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding, plain or YaRN (https://arxiv.org/abs/2309.00071).

    ``factor`` is None for plain RoPE; the other YaRN fields follow Hugging Face's
    ``rope_scaling`` / ``rope_parameters``.
    """

    theta: float
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and options of a Qwen3-MoE model; names follow ``config.json``."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str

    @classmethod
    def from_directory(cls, directory: str | Path) -> ModelConfig:
        """Read a checkpoint directory; see `config.hf.load_model_config`."""
        from moe_engine.config.hf import load_model_config  # hf builds on this module

        return load_model_config(Path(directory))

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], generation: dict[str, Any] | None = None
    ) -> ModelConfig:
        """Build from parsed JSON files; see `config.hf.parse_model_config`."""
        from moe_engine.config.hf import parse_model_config

        return parse_model_config(values, generation)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` (from 0) has experts; the others have one dense MLP."""
        return (
            layer not in self.mlp_only_layers
            and self.num_experts > 0
            and (layer + 1) % self.decoder_sparse_step == 0
        )
