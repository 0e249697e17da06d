"""Attention of whole prompts by PyTorch's cuDNN backend.

Shape legend: T tokens of all prompts, N query heads, G KV heads, D head dimension, B blocks,
L tokens a block, n prompts, P rows of each prompt in the call.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKEND = SDPBackend.CUDNN_ATTENTION


def usable(q_TND: torch.Tensor, cache_BLGD: torch.Tensor) -> bool:
    """Whether cuDNN can attend to such queries and such a cache."""
    return q_TND.dtype == cache_BLGD.dtype and _usable(
        q_TND.device, q_TND.dtype, q_TND.shape[1], cache_BLGD.shape[2], q_TND.shape[2]
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
    k_cache_BLGD: torch.Tensor,
    v_cache_BLGD: torch.Tensor,
    slots_T: torch.Tensor,
    num_prompts: int,
    padded_len: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention of ``num_prompts`` prompts of equal length, one after the other; [T, N, D].

    The keys and values are gathered from the cache. Rows past a prompt's end, up to ``padded_len``,
    only come after all of its own, so that the causal mask hides them; they repeat its last key
    and value, because whatever else they held might not be finite.

    Args:
        slots_T: int64 cache slot of each token; the contexts are these tokens, in this order.
        padded_len: P, at least the length of a prompt.
    """
    prompt_len = q_TND.shape[0] // num_prompts
    slots = slots_T.view(num_prompts, prompt_len)
    q = q_TND.view(num_prompts, prompt_len, *q_TND.shape[1:])
    if padded_len > prompt_len:
        rest = padded_len - prompt_len
        slots = torch.cat([slots, slots[:, -1:].expand(-1, rest)], dim=1)
        q = F.pad(q, (0, 0, 0, 0, 0, rest))

    def gathered(cache_BLGD: torch.Tensor) -> torch.Tensor:
        rows = cache_BLGD.flatten(0, 1).index_select(0, slots.flatten())
        return rows.view(num_prompts, padded_len, *cache_BLGD.shape[2:]).transpose(1, 2)

    with sdpa_kernel(BACKEND):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            gathered(k_cache_BLGD),
            gathered(v_cache_BLGD),
            is_causal=True,
            scale=scale,
            enable_gqa=q.shape[2] != k_cache_BLGD.shape[2],
        )
    return out.transpose(1, 2)[:, :prompt_len].reshape(q_TND.shape)
