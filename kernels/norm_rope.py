"""Query and key preparation in one launch: head norms, rotary embedding, the write to the KV cache.

Legend: T tokens, N query heads, G KV heads, D head dimension, F = D / 2, P positions, B blocks,
L tokens a block, X = (N + 2 × G) × D, A heads of all three kinds, N + 2 × G, R rows (heads of
tokens).

Memory-bound: a program holds some heads of some tokens in registers, the two halves of each head
side by side, since the rotation pairs their elements. All its loads are independent, but for the
angles, which wait for the positions.

Decode attention (`paged_decode`) prepares its heads itself, with the functions of this file. They
leave the compiler no rounding: multiplications and additions are fused where the code says so. A
row of a head of 128 lies in the same eight lanes in every launch, which add it up in the same
order, so both write the same bits, and so does ``csrc/prepared_head.cuh``, which follows them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch_kernel

# (most tokens, heads a program, tokens a program, warps): the first row that fits. One token
# spreads over as many programs as it can; a large batch wants more bytes in flight a program.
LAUNCHES = ((16, 8, 1, 2), (512, 16, 1, 4), (1 << 62, 8, 2, 4))


@triton.jit
def load_norm_weights(q_weight_ptr, k_weight_ptr, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """First and second half of the query norm's weights, then of the key norm's; float32 [1, F]."""
    dims_F = tl.arange(0, BLOCK_F)[None, :]
    in_half_F = dims_F < F
    first_q_F = tl.load(q_weight_ptr + dims_F, mask=in_half_F, other=0.0).to(tl.float32)
    second_q_F = tl.load(q_weight_ptr + F + dims_F, mask=in_half_F, other=0.0).to(tl.float32)
    first_k_F = tl.load(k_weight_ptr + dims_F, mask=in_half_F, other=0.0).to(tl.float32)
    second_k_F = tl.load(k_weight_ptr + F + dims_F, mask=in_half_F, other=0.0).to(tl.float32)
    return first_q_F, second_q_F, first_k_F, second_k_F


@triton.jit
def _load_summed(pointers, mask, part_stride, NUM_PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of NUM_PARTS parts in order, rounded to DTYPE, as float32."""
    total = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        total += tl.load(pointers + part * part_stride, mask=mask, other=0.0)
    return total.to(DTYPE).to(tl.float32)


@triton.jit
def prepare_heads(
    token_ptr_R,
    part_stride,
    head_R,
    there_R,
    cos_RF,
    sin_RF,
    weights,
    eps,
    N: tl.constexpr,
    G: tl.constexpr,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Load heads, norm and rotate queries and keys; both halves, float32 [R, F], 0 where not there.

    Args:
        token_ptr_R: where the token of each row begins in the fused projection's output, or in the
            first of NUM_PARTS parts, ``part_stride`` elements apart, that add up to it.
        head_R: which of its N + 2 * G heads; values stay as they are.
        cos_RF, sin_RF: of the token's position; also [1, F].
        weights: what `load_norm_weights` returned.
    """
    D: tl.constexpr = 2 * F
    first_q_F, second_q_F, first_k_F, second_k_F = weights
    is_q_R1 = (head_R < N)[:, None]
    is_v_R1 = (head_R >= N + G)[:, None]
    dims_F = tl.arange(0, BLOCK_F)[None, :]
    mask_RF = there_R[:, None] & (dims_F < F)
    head_RF = (token_ptr_R + head_R * D)[:, None] + dims_F
    first_RF = _load_summed(head_RF, mask_RF, part_stride, NUM_PARTS, DTYPE)
    second_RF = _load_summed(head_RF + F, mask_RF, part_stride, NUM_PARTS, DTYPE)

    square_RF = tl.fma(first_RF, first_RF, second_RF * second_RF)
    square_R1 = tl.sum(square_RF, axis=1, keep_dims=True)
    scale_R1 = tl.rsqrt(square_R1 / D + eps)
    a_RF = first_RF * scale_R1 * tl.where(is_q_R1, first_q_F, first_k_F)
    b_RF = second_RF * scale_R1 * tl.where(is_q_R1, second_q_F, second_k_F)
    cos_RF = tl.broadcast_to(cos_RF, a_RF.shape)
    sin_RF = tl.broadcast_to(sin_RF, a_RF.shape)
    first_RF = tl.where(is_v_R1, first_RF, tl.fma(a_RF, cos_RF, -(b_RF * sin_RF)))
    second_RF = tl.where(is_v_R1, second_RF, tl.fma(b_RF, cos_RF, a_RF * sin_RF))
    return first_RF, second_RF


@triton.jit
def write_cache(
    k_ptr,
    v_ptr,
    slot_R,
    head_R,
    there_R,
    first_RF,
    second_RF,
    N: tl.constexpr,
    G: tl.constexpr,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Store those of the rows that are keys and values and have a slot, in the cache's dtype.

    Shapes: slot int64 [R], or one for all; head int32 [R]; there bool [R]; first and second, the
    halves of the heads, float32 [R, F]; k and v [B * L, G, D].

    Example, N = 4, G = 2, slot 7: head 5 goes to k[7, 1], head 6 to v[7, 0], heads 0 to 3 nowhere.
    """
    dims_F = tl.arange(0, BLOCK_F)[None, :]
    written_R = there_R & (slot_R >= 0)
    offset_RF = ((slot_R * G + (head_R - N) % G) * (2 * F))[:, None] + dims_F
    to_k_RF = (written_R & (head_R >= N) & (head_R < N + G))[:, None] & (dims_F < F)
    tl.store(k_ptr + offset_RF, first_RF.to(k_ptr.dtype.element_ty), mask=to_k_RF)
    tl.store(k_ptr + offset_RF + F, second_RF.to(k_ptr.dtype.element_ty), mask=to_k_RF)
    to_v_RF = (written_R & (head_R >= N + G))[:, None] & (dims_F < F)
    tl.store(v_ptr + offset_RF, first_RF.to(v_ptr.dtype.element_ty), mask=to_v_RF)
    tl.store(v_ptr + offset_RF + F, second_RF.to(v_ptr.dtype.element_ty), mask=to_v_RF)


@triton.jit(do_not_specialize=["num_tokens", "qkv_part_stride"])
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
    own_k_ptr,
    own_v_ptr,
    num_tokens,
    qkv_stride,
    qkv_part_stride,
    eps,
    N: tl.constexpr,
    G: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_F: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_OWN: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Norm, rotate and store BLOCK_A heads of BLOCK_T tokens.

    Shapes: qkv [T, A * D] with a row stride, or float32 [NUM_PARTS, T, A * D] to be summed; weights
    [D]; cos and sin [P, F]; position and slot int64 [T]; q [T, N, D]; k and v [B * L, G, D]; own
    keys and values [T, G, D], a cache whose slots are the tokens' numbers.
    Programs: the heads of a block of tokens follow each other. float32 arithmetic, rounded once.

    Example, D = 2, weight 1, eps 0, a quarter turn (cos 0, sin 1): the head (3, 4) has the mean
    square 12.5, its norm is (0.849, 1.131), rotated it is (-1.131, 0.849). A value head stays.
    """
    D: tl.constexpr = 2 * F
    BLOCKS_OF_HEADS: tl.constexpr = (N + 2 * G + BLOCK_A - 1) // BLOCK_A
    rows_R = tl.arange(0, BLOCK_T * BLOCK_A)
    # One axis, because the others end at 65,535.
    token_R = tl.program_id(0) // BLOCKS_OF_HEADS * BLOCK_T + rows_R // BLOCK_A
    head_R = tl.program_id(0) % BLOCKS_OF_HEADS * BLOCK_A + rows_R % BLOCK_A
    there_R = (token_R < num_tokens) & (head_R < N + 2 * G)
    dims_F = tl.arange(0, BLOCK_F)[None, :]
    mask_RF = there_R[:, None] & (dims_F < F)

    # Step inputs: complete before the embedding let others begin, so there is no wait for them.
    position_R = tl.load(position_ptr + token_R, mask=there_R, other=0)
    slot_R = tl.load(slot_ptr + token_R, mask=there_R, other=-1)
    angle_RF = position_R[:, None] * F + dims_F
    cos_RF = tl.load(cos_ptr + angle_RF, mask=mask_RF, other=0.0).to(tl.float32)
    sin_RF = tl.load(sin_ptr + angle_RF, mask=mask_RF, other=0.0).to(tl.float32)
    weights = load_norm_weights(q_weight_ptr, k_weight_ptr, F, BLOCK_F)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    token_ptr_R = qkv_ptr + token_R.to(tl.int64) * qkv_stride
    first_RF, second_RF = prepare_heads(
        token_ptr_R, qkv_part_stride, head_R, there_R, cos_RF, sin_RF, weights, eps, N, G, F,
        BLOCK_F, NUM_PARTS, q_ptr.dtype.element_ty,
    )  # fmt: skip
    q_RF = q_ptr + ((token_R.to(tl.int64) * N + head_R) * D)[:, None] + dims_F
    to_q_RF = mask_RF & (head_R < N)[:, None]
    tl.store(q_RF, first_RF.to(q_ptr.dtype.element_ty), mask=to_q_RF)
    tl.store(q_RF + F, second_RF.to(q_ptr.dtype.element_ty), mask=to_q_RF)
    write_cache(k_ptr, v_ptr, slot_R, head_R, there_R, first_RF, second_RF, N, G, F, BLOCK_F)
    if HAS_OWN:
        write_cache(
            own_k_ptr, own_v_ptr, token_R.to(tl.int64), head_R, there_R, first_RF, second_RF, N, G,
            F, BLOCK_F,
        )  # fmt: skip


def norm_rope_write(
    qkv: torch.Tensor,
    q_weight_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    eps: float,
    cos_PF: torch.Tensor,
    sin_PF: torch.Tensor,
    positions_T: torch.Tensor,
    k_cache_BLGD: torch.Tensor,
    v_cache_BLGD: torch.Tensor,
    slots_T: torch.Tensor,
    own_kv_2TGD: torch.Tensor | None = None,
    *,
    launch: tuple[int, int, int] | None = None,
    use_pdl: bool = False,
) -> torch.Tensor:
    """Queries [T, N, D] in the weights' dtype; keys and values go to the cache, in its dtype.

    They also go to ``own_kv_2TGD``, if it is there, whether they have a slot in the cache or not.

    The arguments are checked by the caller. qkv: [T, X] of that dtype, whose rows may lie apart, or
    contiguous float32 [parts, T, X], to be summed and rounded to it.

    Args:
        launch: heads a program, tokens a program, warps; None: as the number of tokens wants it.
        use_pdl: launch before the preceding kernel has ended (compute capability 9 and above);
            ``positions_T``, ``slots_T``, the tables and weights are then read without waiting.
    """
    num_tokens, width = qkv.shape[-2:]
    num_kv_heads, head_dim = k_cache_BLGD.shape[2:]
    num_heads = width // head_dim - 2 * num_kv_heads
    q_TND = torch.empty(
        (num_tokens, num_heads, head_dim), dtype=q_weight_D.dtype, device=qkv.device
    )
    if num_tokens == 0:
        return q_TND
    if launch is None:
        launch = next(row[1:] for row in LAUNCHES if num_tokens <= row[0])
    block_heads, block_tokens, num_warps = launch
    num_all_heads = num_heads + 2 * num_kv_heads
    grid = (triton.cdiv(num_all_heads, block_heads) * triton.cdiv(num_tokens, block_tokens),)
    own_k_TGD, own_v_TGD = (None, None) if own_kv_2TGD is None else own_kv_2TGD.unbind()
    launch_kernel(
        _norm_rope_kernel,
        grid,
        qkv,
        q_weight_D,
        k_weight_D,
        cos_PF,
        sin_PF,
        positions_T,
        slots_T,
        q_TND,
        k_cache_BLGD,
        v_cache_BLGD,
        own_k_TGD,
        own_v_TGD,
        num_tokens,
        qkv.stride(-2),
        qkv.stride(0),
        eps,
        N=num_heads,
        G=num_kv_heads,
        F=head_dim // 2,
        BLOCK_T=block_tokens,
        BLOCK_A=block_heads,
        BLOCK_F=triton.next_power_of_2(head_dim // 2),
        NUM_PARTS=len(qkv) if qkv.dim() == 3 else 1,
        HAS_OWN=own_kv_2TGD is not None,
        USE_PDL=use_pdl,
        num_warps=num_warps,
        launch_pdl=use_pdl,
    )
    return q_TND
