"""RMSNorm (https://arxiv.org/abs/1910.07467), alone and fused with the residual addition.

Legend: T tokens, H the normalised size; any leading shape may stand for T, so the same functions
serve hidden states [T, H] and attention heads [T, heads, head_dim].
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from moe_engine.ops import native
from moe_engine.ops.linear import SplitSums
from moe_engine.ops.reference import norm as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PendingRows(ABC):
    """Rows [T, H] that are made by the one operator that takes them: it must call one of these."""

    @abstractmethod
    def rows(self) -> torch.Tensor:
        """The rows by themselves."""

    @abstractmethod
    def add_rms_norm(
        self, residual_TH: torch.Tensor, norm_weight_H: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`add_rms_norm` of the rows, in one launch."""


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Args:
        x_TH: float32, bfloat16 or float16 [..., H]; computed in float32.
        weight_H: [H], of the same dtype.
        eps: added to the mean of the squares.

    Returns:
        A new tensor like ``x_TH``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(x_TH, weight_H)
    if x_TH.is_cuda and native.has_triton():
        from moe_engine.kernels import rms_norm as kernels

        with torch.cuda.device(x_TH.device):
            normed: torch.Tensor = kernels.rms_norm(x_TH, weight_H, eps)
        return normed
    return reference.rms_norm(x_TH, weight_H, eps)


def add_rms_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the residual, then normalise the sum.

    Args:
        x_TH: output of the previous block, float32, bfloat16 or float16 [..., H].
        residual_TH: the residual stream, of the same shape and dtype.
        weight_H: [H], of the same dtype.
        eps: added to the mean of the squares.

    Returns:
        ``(normed, new_residual)``, two new tensors like ``x_TH``; ``new_residual`` is the sum.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(x_TH, weight_H)
    if _kind(residual_TH) != _kind(x_TH) or residual_TH.shape != x_TH.shape:
        raise ValueError(
            f"residual_TH is {_describe(residual_TH)}; it must be like x_TH, {_describe(x_TH)}"
        )
    if x_TH.is_cuda and native.has_triton():
        from moe_engine.kernels import rms_norm as kernels

        with torch.cuda.device(x_TH.device):
            normed, new_residual = kernels.add_rms_norm(x_TH, residual_TH, weight_H, eps)
        return normed, new_residual
    return reference.add_rms_norm(x_TH, residual_TH, weight_H, eps)


def split_add_rms_norm(
    sums: SplitSums, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` of a sum that has not been taken yet, in one launch."""
    parts_STH = sums.parts_STO
    assert parts_STH.shape[1:] == residual_TH.shape, (parts_STH.shape, residual_TH.shape)
    assert sums.dtype == residual_TH.dtype, (sums.dtype, residual_TH.dtype)
    _check(residual_TH, weight_H)
    if parts_STH.is_cuda and native.has_triton():
        from moe_engine.kernels import rms_norm as kernels

        with torch.cuda.device(parts_STH.device):
            normed, new_residual = kernels.split_add_rms_norm(
                parts_STH.contiguous(), residual_TH, weight_H, eps
            )
        return normed, new_residual
    return reference.add_rms_norm(sums.summed(), residual_TH, weight_H, eps)


def _check(x_TH: torch.Tensor, weight_H: torch.Tensor) -> None:
    if x_TH.dim() < 1 or x_TH.shape[-1] < 1 or x_TH.dtype not in DTYPES:
        raise ValueError(
            f"x_TH is {_describe(x_TH)}; it must be [..., H] with H >= 1, "
            "in float32, bfloat16 or float16"
        )
    if _kind(weight_H) != _kind(x_TH) or weight_H.shape != x_TH.shape[-1:]:
        raise ValueError(
            f"weight_H is {_describe(weight_H)}; for x_TH, {_describe(x_TH)}, it must be "
            f"[{x_TH.shape[-1]}] of the same dtype on the same device"
        )


def _kind(tensor: torch.Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
