"""Query and key preparation: head norms, rotary position embedding, and the write to the KV cache.

Shape legend: T tokens, N query heads, G KV heads, D head dimension, P positions, F = D / 2,
X = (N + 2 × G) × D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_engine.ops import native
from moe_engine.ops.linear import SplitSums
from moe_engine.ops.reference import rope as reference
from moe_engine.ops.reference.rope import rope_cos_sin, rope_frequencies

__all__ = ["RopeTable", "norm_rope_write", "rope_cos_sin", "rope_frequencies"]


@dataclass(frozen=True)
class RopeTable:
    """cos and sin of every position that the model knows, float32 [P, F]."""

    cos_PF: torch.Tensor
    sin_PF: torch.Tensor


def norm_rope_write(
    qkv: torch.Tensor | SplitSums,
    q_weight_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    eps: float,
    rope: RopeTable,
    positions_T: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    slots_T: torch.Tensor,
    own_kv_2TGD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make queries, keys and values of the fused projection's output; returns q [T, N, D].

    Query and key heads go through their RMS norms and are rotated by their positions; keys and
    values are written to the cache.

    Args:
        qkv: [T, X], query heads, then key heads, then value heads; or what is still to be summed
            to that.
        q_weight_D, k_weight_D: weights of the head norms.
        eps: added to the mean of the squares.
        positions_T: int64 position of each token in its sequence.
        cache: keys and values of one layer, each [B, L, G, D].
        slots_T: int64 cache slot (block × L + offset) of each token; -1: not written.
        own_kv_2TGD: contiguous, of the dtype of ``qkv``; keys and values are written here, too,
            one token after the other.
    """
    k_cache_BLGD, v_cache_BLGD = cache
    head_dim = k_cache_BLGD.shape[3]
    parts = qkv.parts_STO if isinstance(qkv, SplitSums) else qkv
    assert q_weight_D.shape == k_weight_D.shape == (head_dim,), (q_weight_D.shape, head_dim)
    assert q_weight_D.dtype == qkv.dtype, (q_weight_D.dtype, qkv.dtype)
    assert parts.shape[-2] == positions_T.shape[0] == slots_T.shape[0], parts.shape
    assert parts.shape[-1] % head_dim == 0, (parts.shape, head_dim)
    if own_kv_2TGD is not None:
        expected = (2, parts.shape[-2], *k_cache_BLGD.shape[2:])
        assert own_kv_2TGD.shape == expected, (own_kv_2TGD.shape, expected)
        assert own_kv_2TGD.dtype == qkv.dtype, (own_kv_2TGD.dtype, qkv.dtype)
        assert own_kv_2TGD.is_contiguous(), own_kv_2TGD.stride()
    if parts.is_cuda and native.has_triton():
        from moe_engine.kernels import norm_rope as kernels
        from moe_engine.kernels.launch import supports_pdl

        assert parts.stride(-1) == 1, parts.stride()
        assert k_cache_BLGD.is_contiguous(), k_cache_BLGD.stride()
        assert v_cache_BLGD.is_contiguous(), v_cache_BLGD.stride()
        assert rope.cos_PF.is_contiguous(), rope.cos_PF.stride()
        assert rope.sin_PF.is_contiguous(), rope.sin_PF.stride()
        with torch.cuda.device(parts.device):
            q_TND: torch.Tensor = kernels.norm_rope_write(
                parts,
                q_weight_D,
                k_weight_D,
                eps,
                rope.cos_PF,
                rope.sin_PF,
                positions_T,
                k_cache_BLGD,
                v_cache_BLGD,
                slots_T,
                own_kv_2TGD,
                use_pdl=supports_pdl(parts.device),
            )
        return q_TND
    return reference.norm_rope_write(
        qkv.summed() if isinstance(qkv, SplitSums) else qkv,
        q_weight_D,
        k_weight_D,
        eps,
        (rope.cos_PF, rope.sin_PF),
        positions_T,
        k_cache_BLGD,
        v_cache_BLGD,
        slots_T,
        own_kv_2TGD,
    )
