"""Decode attention from the fused projection on, two CUDA kernels for Hopper: which is best for
which rows, what they take, and their launch.

Shape legend: R rows, S parts, N query heads, G KV heads, D head dimension, B blocks, L tokens a
block, P positions, F = D / 2, X = (N + 2 × G) × D.
"""

from __future__ import annotations

import torch

from moe_engine.ops import hopper, tuning
from moe_engine.ops.tuning import Launch


def choose(
    qkv: torch.Tensor, dtype: torch.dtype, num_heads: int, k_cache_BLGD: torch.Tensor
) -> Launch | None:
    """The launch that is best for these rows; None: neither kernel takes them or is best.

    Args:
        qkv: [R, X], or float32 parts [S, R, X].
        dtype: of the attention.
    """
    block_size, num_kv_heads, head_dim = k_cache_BLGD.shape[1:]
    num_pairs = qkv.shape[-2] * num_kv_heads
    chosen = tuning.choices(tuning.DecodeChoices, qkv.device, num_heads, num_kv_heads)
    launch = tuning.pick(chosen.launches, num_pairs)
    if launch is None:
        return None
    if not (dtype == k_cache_BLGD.dtype == torch.bfloat16 and hopper.rows_are_aligned(qkv)):
        return None
    library = hopper.extension(qkv.device)
    takes = library is not None and library.decode_attention_fits(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size
    )
    return launch if takes else None


def decode_attention(
    launch: Launch,
    qkv: torch.Tensor,
    norm_weights: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    cos_sin_PF: tuple[torch.Tensor, torch.Tensor],
    positions_R: torch.Tensor,
    slots_R: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    block_tables_RB: torch.Tensor,
    context_lens_R: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`ops.attention.attend` where every row decodes; bfloat16 [R, N, D]. Checks its arguments.

    Args:
        qkv: bfloat16 [R, X], or parts of it, float32 [S, R, X].
        norm_weights: [D] each, of the norms of queries and keys.
        cos_sin_PF: float32 each.
        cache: keys and values, each [B, L, G, D], contiguous.
    """
    from moe_engine.kernels.launch import arrival_counters, compiles_only

    (q_weight_D, k_weight_D), (cos_PF, sin_PF) = norm_weights, cos_sin_PF
    k_cache_BLGD, v_cache_BLGD = cache
    block_size, num_kv_heads, head_dim = k_cache_BLGD.shape[1:]
    num_rows, width = qkv.shape[-2:]
    num_heads = width // head_dim - 2 * num_kv_heads
    assert head_dim == 128, head_dim
    assert qkv.dtype == (torch.float32 if qkv.dim() == 3 else torch.bfloat16), qkv.dtype
    assert qkv.dim() == 2 or qkv.is_contiguous(), qkv.stride()
    for tensor, dtype, shape in (
        (q_weight_D, torch.bfloat16, (head_dim,)),
        (k_weight_D, torch.bfloat16, (head_dim,)),
        (cos_PF, torch.float32, (len(cos_PF), head_dim // 2)),
        (sin_PF, torch.float32, (len(cos_PF), head_dim // 2)),
        (positions_R, torch.int64, (num_rows,)),
        (slots_R, torch.int64, (num_rows,)),
        (context_lens_R, torch.int32, (num_rows,)),
        (k_cache_BLGD, torch.bfloat16, k_cache_BLGD.shape),
        (v_cache_BLGD, torch.bfloat16, k_cache_BLGD.shape),
    ):
        assert tensor.dtype == dtype, (tensor.dtype, dtype)
        assert tensor.shape == shape, (tensor.shape, shape)
        assert tensor.is_contiguous(), tensor.stride()
    assert block_tables_RB.dtype == torch.int32, block_tables_RB.dtype
    assert len(block_tables_RB) == num_rows, block_tables_RB.shape
    # Of a single column the stride may be anything.
    assert block_tables_RB.shape[1] == 1 or block_tables_RB.stride(1) == 1, block_tables_RB.stride()
    out_RND = k_cache_BLGD.new_empty(num_rows, num_heads, head_dim)
    if compiles_only():
        return out_RND  # nobody has written the contexts
    # What the shares of every row and head found, and which of them have arrived.
    num_shares = num_rows * num_heads * launch.max_shares
    parts = out_RND.new_empty(num_shares, head_dim, dtype=torch.float32)
    stats = out_RND.new_empty(num_shares, 2, dtype=torch.float32)
    arrivals = arrival_counters(qkv.device)
    assert num_rows * num_heads <= len(arrivals), (num_rows, num_heads, len(arrivals))
    library = hopper.extension(qkv.device)
    assert library is not None
    with torch.cuda.device(qkv.device):
        library.decode_attention(
            qkv=qkv.data_ptr(),
            qkv_stride=qkv.stride(-2),
            qkv_part_stride=qkv.stride(0),
            num_parts=len(qkv) if qkv.dim() == 3 else 0,
            q_weight=q_weight_D.data_ptr(),
            k_weight=k_weight_D.data_ptr(),
            cos=cos_PF.data_ptr(),
            sin=sin_PF.data_ptr(),
            positions=positions_R.data_ptr(),
            slots=slots_R.data_ptr(),
            k_cache=k_cache_BLGD.data_ptr(),
            v_cache=v_cache_BLGD.data_ptr(),
            block_tables=block_tables_RB.data_ptr(),
            block_tables_stride=block_tables_RB.stride(0),
            context_lens=context_lens_R.data_ptr(),
            out=out_RND.data_ptr(),
            eps=eps,
            scale=scale,
            num_sequences=num_rows,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            block_warps=launch.block_warps,
            max_shares=launch.max_shares,
            min_tokens=launch.min_tokens,
            parts=parts.data_ptr(),
            stats=stats.data_ptr(),
            arrivals=arrivals.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return out_RND
