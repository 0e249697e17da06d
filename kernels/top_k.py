"""The end of routing: from a tile of logits to the experts of each token and their weights.

Legend: T tokens of a tile, E experts, K experts per token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .floats import LOWEST_KEY, WEIGHT_ONE, keys_of, values_of

# Logits that a program selects from: padded experts x tokens.
MAX_LOGITS = 8192


@triton.jit
def select_top_k(
    logits_TE,
    rows_T,
    num_rows,
    num_real_rows,
    num_experts,
    ids_ptr,
    weights_ptr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PADDED_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store the TOP_K best experts of each row and their weights; columns past E are ignored.

    Logits are compared through their keys (`kernels.floats`). NaN sorts like -inf. Every operation
    on a row is exact or in a fixed order, so the result does not depend on how the compiler lays
    the tile out.

    Example, E = 4, TOP_K = 2, logits = [1, 3, 3, 0]: ids [1, 2], since the lower id wins a tie;
    normalised weights [0.5, 0.5], others exp(3 - 3) / (1 + 1 + exp(-2) + exp(-3)) = [0.458, 0.458].
    """
    experts_1E = tl.arange(0, PADDED_E)[None, :]
    is_expert_1E = experts_1E < num_experts
    logits_TE = tl.where(logits_TE == logits_TE, logits_TE, float("-inf"))
    keys_TE = tl.where(is_expert_1E, keys_of(logits_TE), LOWEST_KEY)

    columns_1K = tl.arange(0, BLOCK_K)[None, :]
    top_ids_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    top_logits_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    denominator_T1 = tl.zeros([BLOCK_T, 1], tl.float32)
    best_T1 = tl.max(keys_TE, axis=1, keep_dims=True)
    largest_T1 = values_of(best_T1)
    for k in range(TOP_K):
        candidates_TE = tl.where(keys_TE == best_T1, experts_1E, PADDED_E)
        winner_T1 = tl.min(candidates_TE, axis=1, keep_dims=True)
        best_logit_T1 = values_of(best_T1)
        top_ids_TK = tl.where(columns_1K == k, winner_T1, top_ids_TK)
        top_logits_TK = tl.where(columns_1K == k, best_logit_T1, top_logits_TK)
        if NORMALIZE:
            denominator_T1 += tl.exp(best_logit_T1 - largest_T1)
        keys_TE = tl.where(experts_1E == winner_T1, LOWEST_KEY, keys_TE)
        best_T1 = tl.max(keys_TE, axis=1, keep_dims=True)
    if not NORMALIZE:
        # As integers, whose sum does not depend on the order.
        odds_TE = tl.where(is_expert_1E, tl.exp(logits_TE - largest_T1), 0.0)
        fixed_T1 = tl.sum((odds_TE * WEIGHT_ONE).to(tl.int64), axis=1, keep_dims=True)
        denominator_T1 = fixed_T1.to(tl.float32) * (1.0 / WEIGHT_ONE)
    top_weights_TK = tl.exp(top_logits_TK - largest_T1) / denominator_T1

    is_real_T1 = (rows_T < num_real_rows)[:, None]
    offsets_TK = rows_T.to(tl.int64)[:, None] * TOP_K + columns_1K
    mask_TK = (rows_T < num_rows)[:, None] & (columns_1K < TOP_K)
    tl.store(ids_ptr + offsets_TK, tl.where(is_real_T1, top_ids_TK, -1), mask=mask_TK)
    tl.store(weights_ptr + offsets_TK, tl.where(is_real_T1, top_weights_TK, 0.0), mask=mask_TK)


@triton.jit
def store_padding(
    rows_T,
    num_rows,
    ids_ptr,
    weights_ptr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Ids -1 and weights 0 for rows that stand for no token.

    Shapes: rows int32 [T]; ids int32 and weights float32 [num_rows, TOP_K].

    Example, TOP_K = 2, num_rows = 3, rows = [2, 3]: ids[2] = [-1, -1] and weights[2] = [0, 0]; row
    3 does not exist.
    """
    columns_1K = tl.arange(0, BLOCK_K)[None, :]
    offsets_TK = rows_T.to(tl.int64)[:, None] * TOP_K + columns_1K
    mask_TK = (rows_T < num_rows)[:, None] & (columns_1K < TOP_K)
    tl.store(ids_ptr + offsets_TK, -1, mask=mask_TK)
    tl.store(weights_ptr + offsets_TK, 0.0, mask=mask_TK)
