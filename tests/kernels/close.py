"""How close a kernel's rows must be to what float32 gives."""

from __future__ import annotations

import torch

# Of the norm of a row, when intermediate results and the row itself are rounded to bfloat16.
TOLERANCE = 1.2e-2


def check_rows(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Every row is within `TOLERANCE` of what float32 gives."""
    assert found.shape == expected.shape
    assert found.dtype == torch.bfloat16
    errors, norms = (found.float() - expected).norm(dim=1), expected.norm(dim=1)
    # Not "not above": NaN must fail.
    assert (errors <= TOLERANCE * norms).all(), f"{(errors / norms).max():.4f} of a row's norm"
