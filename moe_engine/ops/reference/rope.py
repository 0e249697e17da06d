"""Rotary position embedding, and all that happens to queries and keys, in plain torch.

Shape legend: T tokens, N query heads, G KV heads, D head dimension, P positions, F = D / 2,
X = (N + 2 × G) × D.
"""

from __future__ import annotations

import math

import torch

from moe_engine.config import RopeConfig
from moe_engine.ops.reference.attention import write_kv


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, float32 [head_dim / 2], and the factor that scales cos and sin.

    Plain RoPE (https://arxiv.org/abs/2104.09864) when ``rope.factor`` is None, else YaRN
    (https://arxiv.org/abs/2309.00071, section 3.2 "NTK-by-parts") with Hugging Face's parameters.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.factor is None:
        return plain, 1.0
    low, high = _ramp_bounds(rope, head_dim)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    interpolated_share = ramp.clamp(0.0, 1.0)
    frequencies = plain / rope.factor * interpolated_share + plain * (1.0 - interpolated_share)
    return frequencies, _attention_factor(rope, rope.factor)


def _ramp_bounds(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """Dimensions between which YaRN moves from extrapolation to interpolation."""
    assert rope.original_max_position_embeddings is not None
    context = rope.original_max_position_embeddings

    def dimension_of(num_rotations: float) -> float:
        wavelengths = context / (num_rotations * 2.0 * math.pi)
        return head_dim * math.log(wavelengths) / (2.0 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high if high != low else low + 0.001


def _attention_factor(rope: RopeConfig, factor: float) -> float:
    """YaRN's attention temperature, as Hugging Face derives it from the optional fields."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scaled(mscale: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scaled(rope.mscale) / scaled(rope.mscale_all_dim)
    return scaled(1.0)


def rope_cos_sin(
    num_positions: int, frequencies: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the positions 0 .. num_positions - 1, float32 [P, F] each, times ``scale``."""
    positions = torch.arange(num_positions, dtype=torch.float32, device=frequencies.device)
    angles = positions[:, None] * frequencies[None, :]
    return angles.cos() * scale, angles.sin() * scale


def apply_rope(x_TND: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of every head by the position's angles (F = D / 2).

    Example: with D = 2, cos = 0 and sin = 1 (a quarter turn), (1, 2) becomes (-2, 1).
    """
    first, second = x_TND.chunk(2, dim=-1)
    cos, sin = cos_TF[:, None, :], sin_TF[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def norm_rope_write(
    qkv_TX: torch.Tensor,
    q_weight_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    eps: float,
    cos_sin_PF: tuple[torch.Tensor, torch.Tensor],
    positions_T: torch.Tensor,
    k_cache_BLGD: torch.Tensor,
    v_cache_BLGD: torch.Tensor,
    slots_T: torch.Tensor,
    own_kv_2TGD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm and rotate query and key heads in float32, store keys and values, return q [T, N, D].

    Everything is rounded to the dtype once, at the end.
    """
    num_kv_heads, head_dim = k_cache_BLGD.shape[2:]
    num_heads = qkv_TX.shape[1] // head_dim - 2 * num_kv_heads
    heads = qkv_TX.unflatten(1, (-1, head_dim))
    q_TND, k_TGD, v_TGD = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos_TF, sin_TF = (table[positions_T] for table in cos_sin_PF)
    q_TND = apply_rope(_norm(q_TND, q_weight_D, eps), cos_TF, sin_TF).to(qkv_TX.dtype)
    k_TGD = apply_rope(_norm(k_TGD, k_weight_D, eps), cos_TF, sin_TF)
    if own_kv_2TGD is not None:
        own_kv_2TGD[0], own_kv_2TGD[1] = k_TGD, v_TGD
    k_TGD, v_TGD = k_TGD.to(k_cache_BLGD.dtype), v_TGD.to(v_cache_BLGD.dtype)
    write_kv(k_TGD, v_TGD, k_cache_BLGD, v_cache_BLGD, slots_T)
    return q_TND


def _norm(x_TND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of every head, float32."""
    x_TND = x_TND.float()
    mean_square = x_TND.pow(2).mean(-1, keepdim=True)
    return x_TND * torch.rsqrt(mean_square + eps) * weight_D.float()
