"""Attention of whole prompts by PyTorch's cuDNN backend.

Shape legend: T tokens of all prompts, N query heads, G KV heads, D head dimension, B blocks,
L tokens a block, P rows of each prompt in the call.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKEND = SDPBackend.CUDNN_ATTENTION


def usable(dtype: torch.dtype, num_heads: int, cache_BLGD: torch.Tensor) -> bool:
    """Whether cuDNN can attend, with such query heads, to what such a cache keeps unchanged."""
    num_kv_heads, head_dim = cache_BLGD.shape[2:]
    return dtype == cache_BLGD.dtype and _usable(
        cache_BLGD.device, dtype, num_heads, num_kv_heads, head_dim
    )


@functools.cache
def _usable(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> bool:
    if device.type != "cuda":
        return False
    q = torch.empty(1, num_heads, 256, head_dim, dtype=dtype, device=device)
    k = torch.empty(1, num_kv_heads, 256, head_dim, dtype=dtype, device=device)
    params = torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, True, num_heads != num_kv_heads)
    return torch.backends.cuda.can_use_cudnn_attention(params)


def attend(
    q_TND: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    num_prompts: int,
    padded_len: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention of ``num_prompts`` prompts of equal length, one after the other; [T, N, D].

    Zeros fill the prompts up; they only come after all of a prompt's own rows, so that the causal
    mask hides them.

    Args:
        q_TND, k_TGD, v_TGD: each contiguous.
        padded_len: P, at least the length of a prompt.
    """
    prompt_len = q_TND.shape[0] // num_prompts

    def filled(x: torch.Tensor) -> torch.Tensor:
        """[prompts, heads, P, D], always with the same strides: others would be another plan."""
        x = x.unflatten(0, (num_prompts, prompt_len))
        if padded_len > prompt_len:
            x = F.pad(x, (0, 0, 0, 0, 0, padded_len - prompt_len))
        return x.transpose(1, 2)

    with sdpa_kernel(BACKEND):
        out = F.scaled_dot_product_attention(
            filled(q_TND),
            filled(k_TGD),
            filled(v_TGD),
            is_causal=True,
            scale=scale,
            enable_gqa=q_TND.shape[1] != k_TGD.shape[1],
        )
    return out.transpose(1, 2)[:, :prompt_len].reshape(q_TND.shape)
