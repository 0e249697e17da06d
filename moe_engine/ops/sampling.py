"""Sampling operators over batches of logits; choosing tokens has kernels, the rest has none.

Shapes: B rows of the batch, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_engine.ops import native
from moe_engine.ops.reference import sampling as reference
from moe_engine.ops.reference.sampling import (
    apply_output_penalties,
    apply_repetition_penalty,
    to_float32_without_nan,
    top_logprobs,
)

__all__ = [
    "any_filter",
    "apply_output_penalties",
    "apply_repetition_penalty",
    "greedy_tokens",
    "params_device",
    "sample_tokens",
    "to_float32_without_nan",
    "top_logprobs",
]

# The kernels add up weights of up to 2**40 in int64.
_MAX_VOCAB_SIZE = 2**22
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def greedy_tokens(logits_BV: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The most likely token of each row, int64 [B]; the lowest id where several are.

    Args:
        logits_BV: any float dtype, V >= 1; NaN counts as -inf, and a row of -inf alone gives 0.
        out: contiguous int64 [B] to write the tokens to and to return; None: a new tensor.
    """
    _check_out(out, logits_BV)
    if logits_BV.is_cuda and native.has_triton():
        from moe_engine.kernels import greedy as kernels

        with torch.cuda.device(logits_BV.device):
            tokens_B: torch.Tensor = kernels.greedy_tokens(logits_BV, out)
        return tokens_B
    return _returned(reference.greedy_tokens(logits_BV), out)


def params_device(device: torch.device) -> torch.device:
    """Where `sample_tokens` wants its parameters if the logits are on ``device``.

    Kernels read them on the device; the reference needs some of them on the host.
    """
    if device.type == "cuda" and native.has_triton():
        return device
    return torch.device("cpu")


def sample_tokens(
    logits_BV: torch.Tensor,
    params_5B: torch.Tensor,
    *,
    may_filter: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose a token per row: temperature, min_p, top_k, top_p, then the draw; int64 [B].

    The reference (`moe_engine.ops.reference.sampling`) defines the filters and the draw; where the
    kernels may differ from it, `moe_engine.kernels.sampling` says. A row's token depends on that
    row alone. Nothing here waits for the device.

    Args:
        logits_BV: any float dtype, V >= 1; NaN counts as -inf, and a row of -inf alone gives 0.
        params_5B: float64 on `params_device`; of each row
            0: temperature, at least 1e-5, or 0 for the most likely token, whatever the others are;
            1: top_k, how many of the most likely tokens stay; 0, or V and more: all;
            2: top_p in (0, 1]; 1: off;
            3: min_p in [0, 1]; 0: off;
            4: the uniform number in [0, 1) that decides the draw.
        may_filter: False promises that top_k, top_p and min_p are off in all rows with a
            temperature, which takes one launch instead of seven. The tokens are the same.
        out: contiguous int64 [B] to write the tokens to and to return; None: a new tensor.
    """
    num_rows, vocab_size = logits_BV.shape
    assert params_5B.shape == (5, num_rows), (params_5B.shape, logits_BV.shape)
    assert params_5B.dtype == torch.float64, params_5B.dtype
    assert params_5B.device == params_device(logits_BV.device), params_5B.device
    assert vocab_size <= _MAX_VOCAB_SIZE, vocab_size
    _check_out(out, logits_BV)
    if not params_5B.is_cuda:
        assert may_filter or not any_filter(params_5B.numpy(), vocab_size)
        return _returned(reference.sample_tokens(logits_BV, params_5B), out)
    from moe_engine.kernels import sampling as kernels

    assert num_rows == 0 or params_5B.stride(1) == 1, params_5B.stride()
    if logits_BV.dtype not in _KERNEL_DTYPES:
        logits_BV = logits_BV.to(torch.float32)
    with torch.cuda.device(logits_BV.device):
        tokens_B: torch.Tensor = kernels.sample_tokens(
            logits_BV, params_5B, may_filter=may_filter, out=out
        )
    return tokens_B


def any_filter(params_5B: np.ndarray, vocab_size: int) -> bool:
    """Whether a row of the parameters of `sample_tokens`, on the host, draws and filters.

    Example: temperatures [1, 0], top_k [0, 5], top_p [1, 1], min_p [0, 0]: no, the second row is
    greedy; with temperatures [1, 0.5]: yes.
    """
    temperature_B, top_k_B, top_p_B, min_p_B = params_5B[:4]
    has_top_k_B = (top_k_B > 0.0) & (top_k_B < vocab_size)
    return bool(((temperature_B > 0.0) & (has_top_k_B | (top_p_B < 1.0) | (min_p_B > 0.0))).any())


def _check_out(out: torch.Tensor | None, logits_BV: torch.Tensor) -> None:
    if out is not None:
        assert out.shape == logits_BV.shape[:1], (out.shape, logits_BV.shape)
        assert out.dtype == torch.int64, out.dtype
        assert out.device == logits_BV.device, (out.device, logits_BV.device)
        assert out.is_contiguous()


def _returned(tokens_B: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """The tokens, in ``out`` if it is given."""
    return tokens_B if out is None else out.copy_(tokens_B)
