"""The embedding in plain torch.

Legend: T tokens, H hidden size, P rows of the shard.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def embedding(
    token_ids_T: torch.Tensor, weight_PH: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """See `ops.embedding.embedding`."""
    elsewhere_T1 = ((token_ids_T < first) | (token_ids_T >= last))[:, None]
    rows_T = (token_ids_T - first).masked_fill(elsewhere_T1[:, 0], 0)
    return F.embedding(rows_T, weight_PH).masked_fill(elsewhere_T1, 0.0)
