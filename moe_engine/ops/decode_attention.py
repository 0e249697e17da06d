"""Decode attention from the fused projection on, two CUDA kernels for Hopper: which is best for
which rows, what they take, and their launch.

Shape legend: R rows, S parts, N query heads, G KV heads, D head dimension, B blocks, L tokens a
block, P positions, F = D / 2, X = (N + 2 × G) × D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_engine.ops import hopper


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel, and how a row and KV head's context is shared out. The bits of a row depend on it.

    Attributes:
        block_warps: 0: ``csrc/warp_decode.cu``, clusters of 64 warps; else ``block_decode.cu``, and
            the warps of a thread block: 12, which has a multiprocessor for itself, or 6.
        max_shares: that a context is cut into, each with a cluster or block of its own, at most.
        min_tokens: of a share.
    """

    block_warps: int
    max_shares: int
    min_tokens: int


# (most rows times KV heads, launch): the first row that fits; beyond the last
# `kernels.paged_decode` is best. ``benchmarks.tune_decode`` measures whole steps with each.
#
# Clusters, by whole steps of Qwen3-30B-A3B, which has 4 KV heads, on an H200, in ms against
# paged_decode's, by the prompts' length: batch 1: 2.58 (2.66) at 512, 3.05 (3.36) at 8192, 4.12
# (5.00) at 32,768; batch 2: 3.35 (3.54) at 512; batch 4, with 4 shares: 4.94 (5.02) at 512, 5.44
# (5.47) at 2048, 6.73 (6.20) at 8192.
#
# Blocks, not measured yet: so many shares that contexts of 640 tokens fill 132 multiprocessors, and
# that a long context among them does not outlast the rest. A block without a share costs a little.
LAUNCHES: tuple[tuple[int, Launch], ...] = (
    (8, Launch(block_warps=0, max_shares=8, min_tokens=2048)),
    (16, Launch(block_warps=6, max_shares=8, min_tokens=80)),
    (32, Launch(block_warps=12, max_shares=8, min_tokens=160)),
    (64, Launch(block_warps=12, max_shares=8, min_tokens=320)),
    (132, Launch(block_warps=12, max_shares=4, min_tokens=1024)),
    (264, Launch(block_warps=6, max_shares=4, min_tokens=1024)),
    (512, Launch(block_warps=6, max_shares=4, min_tokens=2048)),
    (1024, Launch(block_warps=6, max_shares=2, min_tokens=4096)),
)


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
    launch = next((row[1] for row in LAUNCHES if num_pairs <= row[0]), None)
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
