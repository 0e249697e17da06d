"""The embedding: rows of the vocabulary, or of a rank's shard of it, by token ids.

Legend: T tokens, H hidden size, P rows of the shard.
"""

from __future__ import annotations

import torch

from moe_engine.ops import native
from moe_engine.ops.reference import embedding as reference


def embedding(
    token_ids_T: torch.Tensor, weight_PH: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """The rows of token ids; zeros for the ids of other shards.

    Args:
        token_ids_T: contiguous int64, not negative.
        weight_PH: its first ``last - first`` rows are those of the ids from ``first`` on; columns
            side by side.
        first, last: the shard has the ids in ``[first, last)``.

    Returns:
        [T, H] of the dtype of ``weight_PH``.

    Example: ids [0, 5, 3] with a shard of [2, 4): zeros, zeros, ``weight_PH[1]``.
    """
    assert token_ids_T.dtype == torch.int64, token_ids_T.dtype
    assert token_ids_T.is_contiguous()
    assert token_ids_T.device == weight_PH.device, (token_ids_T.device, weight_PH.device)
    assert 0 <= first <= last <= first + weight_PH.shape[0], (first, last, weight_PH.shape)
    assert weight_PH.stride(1) == 1 or weight_PH.shape[1] == 1, weight_PH.stride()
    if weight_PH.is_cuda and native.has_triton():
        from moe_engine.kernels import embedding as kernels

        with torch.cuda.device(weight_PH.device):
            rows_TH: torch.Tensor = kernels.embedding(token_ids_T, weight_PH, first, last)
        return rows_TH
    return reference.embedding(token_ids_T, weight_PH, first, last)
