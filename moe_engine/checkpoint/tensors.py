"""The tensors that a qwen3_moe checkpoint must hold, by name and full shape.

Names are the hub's, with one tensor per expert and projection. A linear layer's weight is
``[out_features, in_features]``.
"""

from __future__ import annotations

from moe_engine.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

Shapes = dict[str, tuple[int, ...]]


def checkpoint_tensors(config: ModelConfig) -> Shapes:
    """Name -> shape of every tensor that a checkpoint of this config must hold.

    ``lm_head.weight`` is absent when the embedding is tied; it then *is* the embedding.
    """
    hidden = config.hidden_size
    shapes: Shapes = {EMBEDDING: (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes.update(_attention(config, f"{prefix}.self_attn"))
        if config.is_moe_layer(layer):
            shapes[f"{prefix}.mlp.gate.weight"] = (config.num_experts, hidden)
            for expert in range(config.num_experts):
                expert_prefix = f"{prefix}.mlp.experts.{expert}"
                shapes.update(_mlp(hidden, config.moe_intermediate_size, expert_prefix))
        else:
            shapes.update(_mlp(hidden, config.intermediate_size, f"{prefix}.mlp"))
    return shapes


def _attention(config: ModelConfig, prefix: str) -> Shapes:
    hidden = config.hidden_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    shapes: Shapes = {
        f"{prefix}.q_proj.weight": (q_size, hidden),
        f"{prefix}.k_proj.weight": (kv_size, hidden),
        f"{prefix}.v_proj.weight": (kv_size, hidden),
        f"{prefix}.o_proj.weight": (hidden, q_size),
        f"{prefix}.q_norm.weight": (config.head_dim,),
        f"{prefix}.k_norm.weight": (config.head_dim,),
    }
    if config.attention_bias:
        shapes[f"{prefix}.q_proj.bias"] = (q_size,)
        shapes[f"{prefix}.k_proj.bias"] = (kv_size,)
        shapes[f"{prefix}.v_proj.bias"] = (kv_size,)
        shapes[f"{prefix}.o_proj.bias"] = (hidden,)
    return shapes


def _mlp(hidden: int, intermediate: int, prefix: str) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (intermediate, hidden),
        f"{prefix}.up_proj.weight": (intermediate, hidden),
        f"{prefix}.down_proj.weight": (hidden, intermediate),
    }
