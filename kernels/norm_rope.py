"""Query and key preparation in one launch: head norms, rotary embedding, the write to the KV cache.

Legend: T tokens, N query heads, G KV heads, D head dimension, F = D / 2, P positions, B blocks,
L tokens a block, X = (N + 2 × G) × D, A heads of all three kinds, N + 2 × G.

Memory-bound: a program holds some heads of some tokens in registers, the two halves of each head
side by side, since the rotation pairs their elements. All its loads are independent, but for the
angles, which wait for the positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# (most tokens, heads a program, tokens a program, warps): the first row that fits. One token
# spreads over as many programs as it can; a large batch wants more bytes in flight a program.
LAUNCHES = ((16, 8, 1, 2), (512, 16, 1, 4), (1 << 62, 8, 4, 4))


@triton.jit(do_not_specialize=["num_tokens"])
def _norm_rope_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    slot_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    num_tokens,
    qkv_stride,
    eps,
    N: tl.constexpr,
    G: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_F: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Norm, rotate and store BLOCK_A heads of BLOCK_T tokens.

    Shapes: qkv [T, A * D] with a row stride; weights [D]; cos and sin [P, F]; position and slot
    int64 [T]; q [T, N, D]; k and v [B * L, G, D]. Grid: (heads / BLOCK_A, tokens / BLOCK_T).
    float32 arithmetic, rounded once.

    Example, D = 2, weight 1, eps 0, a quarter turn (cos 0, sin 1): the head (3, 4) has the mean
    square 12.5, its norm is (0.849, 1.131), rotated it is (-1.131, 0.849). A value head stays.
    """
    D: tl.constexpr = 2 * F
    BLOCK_R: tl.constexpr = BLOCK_T * BLOCK_A
    rows_R = tl.arange(0, BLOCK_R)
    token_R = tl.program_id(1) * BLOCK_T + rows_R // BLOCK_A
    head_R = tl.program_id(0) * BLOCK_A + rows_R % BLOCK_A
    there_R = (token_R < num_tokens) & (head_R < N + 2 * G)
    is_q_R = head_R < N
    is_v_R = head_R >= N + G
    dims_F = tl.arange(0, BLOCK_F)[None, :]
    in_half_F = dims_F < F
    mask_RF = there_R[:, None] & in_half_F

    # Step inputs: complete before the step's first kernel began, so there is no wait for them.
    position_R = tl.load(position_ptr + token_R, mask=there_R, other=0)
    slot_R = tl.load(slot_ptr + token_R, mask=there_R, other=-1)
    angle_RF = position_R[:, None] * F + dims_F
    cos_RF = tl.load(cos_ptr + angle_RF, mask=mask_RF, other=0.0).to(tl.float32)
    sin_RF = tl.load(sin_ptr + angle_RF, mask=mask_RF, other=0.0).to(tl.float32)
    first_q_F = tl.load(q_weight_ptr + dims_F, mask=in_half_F, other=0.0).to(tl.float32)
    second_q_F = tl.load(q_weight_ptr + F + dims_F, mask=in_half_F, other=0.0).to(tl.float32)
    first_k_F = tl.load(k_weight_ptr + dims_F, mask=in_half_F, other=0.0).to(tl.float32)
    second_k_F = tl.load(k_weight_ptr + F + dims_F, mask=in_half_F, other=0.0).to(tl.float32)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    qkv_RF = qkv_ptr + (token_R.to(tl.int64) * qkv_stride + head_R * D)[:, None] + dims_F
    first_RF = tl.load(qkv_RF, mask=mask_RF, other=0.0).to(tl.float32)
    second_RF = tl.load(qkv_RF + F, mask=mask_RF, other=0.0).to(tl.float32)

    square_R = tl.sum(first_RF * first_RF + second_RF * second_RF, axis=1)
    scale_RF = tl.rsqrt(square_R / D + eps)[:, None]
    a_RF = first_RF * scale_RF * tl.where(is_q_R[:, None], first_q_F, first_k_F)
    b_RF = second_RF * scale_RF * tl.where(is_q_R[:, None], second_q_F, second_k_F)
    first_RF = tl.where(is_v_R[:, None], first_RF, a_RF * cos_RF - b_RF * sin_RF)
    second_RF = tl.where(is_v_R[:, None], second_RF, b_RF * cos_RF + a_RF * sin_RF)

    q_RF = q_ptr + ((token_R.to(tl.int64) * N + head_R) * D)[:, None] + dims_F
    to_q_RF = mask_RF & is_q_R[:, None]
    tl.store(q_RF, first_RF.to(q_ptr.dtype.element_ty), mask=to_q_RF)
    tl.store(q_RF + F, second_RF.to(q_ptr.dtype.element_ty), mask=to_q_RF)
    written_RF = mask_RF & (slot_R >= 0)[:, None]
    cache_row_R = slot_R * G + (head_R - N) % G
    offset_RF = (cache_row_R * D)[:, None] + dims_F
    to_k_RF = written_RF & ((head_R >= N) & (head_R < N + G))[:, None]
    tl.store(k_ptr + offset_RF, first_RF.to(k_ptr.dtype.element_ty), mask=to_k_RF)
    tl.store(k_ptr + offset_RF + F, second_RF.to(k_ptr.dtype.element_ty), mask=to_k_RF)
    to_v_RF = written_RF & is_v_R[:, None]
    tl.store(v_ptr + offset_RF, first_RF.to(v_ptr.dtype.element_ty), mask=to_v_RF)
    tl.store(v_ptr + offset_RF + F, second_RF.to(v_ptr.dtype.element_ty), mask=to_v_RF)


def norm_rope_write(
    qkv_TX: torch.Tensor,
    q_weight_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    eps: float,
    cos_PF: torch.Tensor,
    sin_PF: torch.Tensor,
    positions_T: torch.Tensor,
    k_cache_BLGD: torch.Tensor,
    v_cache_BLGD: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    launch: tuple[int, int, int] | None = None,
    use_pdl: bool = False,
) -> torch.Tensor:
    """Queries [T, N, D] in ``qkv_TX``'s dtype; keys and values go to the cache, in its dtype.

    The arguments are checked by the caller; the rows of ``qkv_TX`` may lie apart.

    Args:
        launch: heads a program, tokens a program, warps; None: as the number of tokens wants it.
        use_pdl: launch before the preceding kernel has ended (compute capability 9 and above);
            ``positions_T``, ``slots_T``, the tables and weights are then read without waiting.
    """
    num_tokens = qkv_TX.shape[0]
    num_kv_heads, head_dim = k_cache_BLGD.shape[2:]
    num_heads = qkv_TX.shape[1] // head_dim - 2 * num_kv_heads
    q_TND = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv_TX.dtype, device=qkv_TX.device)
    if num_tokens == 0:
        return q_TND
    if launch is None:
        launch = next(row[1:] for row in LAUNCHES if num_tokens <= row[0])
    block_heads, block_tokens, num_warps = launch
    num_all_heads = num_heads + 2 * num_kv_heads
    grid = (triton.cdiv(num_all_heads, block_heads), triton.cdiv(num_tokens, block_tokens))
    _norm_rope_kernel[grid](
        qkv_TX,
        q_weight_D,
        k_weight_D,
        cos_PF,
        sin_PF,
        positions_T,
        slots_T,
        q_TND,
        k_cache_BLGD,
        v_cache_BLGD,
        num_tokens,
        qkv_TX.stride(0),
        eps,
        N=num_heads,
        G=num_kv_heads,
        F=head_dim // 2,
        BLOCK_T=block_tokens,
        BLOCK_A=block_heads,
        BLOCK_F=triton.next_power_of_2(head_dim // 2),
        USE_PDL=use_pdl,
        num_warps=num_warps,
        launch_pdl=use_pdl,
    )
    return q_TND
