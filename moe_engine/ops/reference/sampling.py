"""Turning logits into tokens: penalties, filters, the draw, and log-probabilities.

Every function is pure and treats each row on its own, and none waits for the device: shapes follow
from the arguments' shapes and host numbers only. `moe_engine.engine.sampler` puts them in order.

A row's result depends, bit for bit, on that row alone (on the CPU; on other devices as far as their
softmax does). Two choices make it so. Probabilities come from ``torch.softmax``, whose CPU kernel
walks one row at a time, whereas ``sum`` splits a long row among threads if the batch has few. And
probabilities are added up as integers (`_fixed_point`), where the order, which is the device's
choice, does not matter.

Shapes: B rows of the batch, R of them that an operation is for, N positions, V vocabulary, K top.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from moe_engine.ops.transfer import to_device

# Multiplies probabilities into int64: fine enough for the smallest probability that a draw with
# 53 random bits can meet, with room for a sum that rounding has put above 1.
_FIXED_POINT_ONE = 2.0**60

# Filters and the draw take about ten times the memory of the logits; this bounds them.
_DRAW_ROWS_AT_ONCE = 64

_FLOAT32_MAX = torch.finfo(torch.float32).max


def to_float32_without_nan(logits_BV: torch.Tensor) -> torch.Tensor:
    """A float32 copy of ``logits_BV`` (any float dtype) in which NaN has become -inf.

    One broken logit then cannot be chosen and does not spoil its row.
    """
    return torch.nan_to_num(
        logits_BV.to(torch.float32), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf
    )


def apply_repetition_penalty(
    logits_RV: torch.Tensor, seen_RV: torch.Tensor, penalty_R: torch.Tensor
) -> torch.Tensor:
    """Make tokens that occurred less likely: positive logits divided, negative ones multiplied.

    From CTRL (Keskar et al. 2019, section 4.1), with the sign rule of Hugging Face.

    Args:
        logits_RV: float32.
        seen_RV: bool, whether the token occurred in the prompt or the output.
        penalty_R: float32 > 0; below 1 makes the tokens more likely.
    """
    penalty_R1 = penalty_R.unsqueeze(1)
    penalized_RV = torch.where(logits_RV < 0, logits_RV * penalty_R1, logits_RV / penalty_R1)
    return torch.where(seen_RV, penalized_RV, logits_RV)


def apply_output_penalties(
    logits_RV: torch.Tensor,
    counts_RV: torch.Tensor,
    frequency_R: torch.Tensor,
    presence_R: torch.Tensor,
) -> torch.Tensor:
    """OpenAI's penalties: ``logit - count * frequency - (count > 0) * presence``.

    Args:
        logits_RV: float32.
        counts_RV: int32, how often the output has the token.
        frequency_R, presence_R: float32.
    """
    logits_RV = logits_RV - counts_RV * frequency_R.unsqueeze(1)
    return logits_RV - (counts_RV > 0) * presence_R.unsqueeze(1)


def greedy_tokens(logits_BV: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row, int64 [B]; the lowest id where several are.

    NaN counts as -inf; a row of -inf alone gives 0.
    """
    return torch.argmax(logits_BV.masked_fill(logits_BV.isnan(), -torch.inf), dim=-1)


def sample_tokens(logits_BV: torch.Tensor, params_5B: torch.Tensor) -> torch.Tensor:
    """See `moe_engine.ops.sampling.sample_tokens`; ``params_5B`` is on the host."""
    params: np.ndarray = params_5B.numpy()
    drawn_R = np.flatnonzero(params[0] > 0.0)
    if not len(drawn_R):
        return greedy_tokens(logits_BV)
    tokens_R = torch.cat(
        [
            _draw_rows(logits_BV, rows, params[:, rows])
            for rows in np.split(
                drawn_R, range(_DRAW_ROWS_AT_ONCE, len(drawn_R), _DRAW_ROWS_AT_ONCE)
            )
        ]
    )
    if len(drawn_R) == len(logits_BV):
        return tokens_R
    index_R = to_device(drawn_R, torch.int64, logits_BV.device)
    return greedy_tokens(logits_BV).index_copy(0, index_R, tokens_R)


def _draw_rows(logits_BV: torch.Tensor, rows: np.ndarray, params_5R: np.ndarray) -> torch.Tensor:
    """Temperature, filters and the draw of some rows; int64 [R]."""
    device = logits_BV.device
    temperature_R, top_k_R, top_p_R, min_p_R, uniform_R = params_5R
    if len(rows) < len(logits_BV):
        logits_BV = logits_BV.index_select(0, to_device(rows, torch.int64, device))
    logits_RV = scale_by_temperature(
        to_float32_without_nan(logits_BV), to_device(temperature_R, torch.float32, device)
    )

    def filter_rows(
        logits_RV: torch.Tensor,
        is_filtered_R: np.ndarray,
        mask: Callable[[torch.Tensor, np.ndarray], torch.Tensor],
    ) -> torch.Tensor:
        chosen = np.flatnonzero(is_filtered_R)
        if not len(chosen):
            return logits_RV
        if len(chosen) == len(logits_RV):
            return mask(logits_RV, chosen)
        index = to_device(chosen, torch.int64, device)
        return logits_RV.index_copy(0, index, mask(logits_RV.index_select(0, index), chosen))

    logits_RV = filter_rows(
        logits_RV,
        min_p_R > 0.0,
        lambda some, rows: mask_min_p(some, to_device(min_p_R[rows], torch.float32, device)),
    )
    logits_RV = filter_rows(
        logits_RV,
        (top_k_R > 0) & (top_k_R < logits_RV.shape[1]),
        lambda some, rows: mask_top_k(
            some, to_device(top_k_R[rows], torch.int64, device), int(top_k_R[rows].max())
        ),
    )
    logits_RV = filter_rows(
        logits_RV,
        top_p_R < 1.0,
        lambda some, rows: mask_top_p(some, to_device(top_p_R[rows], torch.float64, device)),
    )
    return draw_tokens(logits_RV, to_device(uniform_R, torch.float64, device))


def scale_by_temperature(logits_RV: torch.Tensor, temperature_R: torch.Tensor) -> torch.Tensor:
    """``logits / temperature`` as float32 that a softmax can take (see `_softmax_ready`).

    Args:
        logits_RV: float32, no NaN.
        temperature_R: float32 > 0.
    """
    return _softmax_ready(logits_RV / temperature_R.unsqueeze(1))


def mask_min_p(logits_RV: torch.Tensor, min_p_R: torch.Tensor) -> torch.Tensor:
    """Set tokens to -inf that are less likely than ``min_p`` times the most likely one.

    From Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling". ``min_p_R``: float32 in [0, 1].
    """
    probs_RV = torch.softmax(logits_RV, dim=-1)
    threshold_R1 = probs_RV.amax(dim=-1, keepdim=True) * min_p_R.unsqueeze(1)
    return logits_RV.masked_fill(probs_RV < threshold_R1, -torch.inf)


def mask_top_k(logits_RV: torch.Tensor, top_k_R: torch.Tensor, max_top_k: int) -> torch.Tensor:
    """Set tokens to -inf that are not among the ``top_k`` most likely.

    Tokens that tie with the last one kept stay too, as in Hugging Face and vLLM.

    Args:
        logits_RV: float32.
        top_k_R: int64 in [1, max_top_k].
        max_top_k: at most V.
    """
    top_RK = torch.topk(logits_RV, max_top_k, dim=-1).values
    threshold_R1 = top_RK.gather(1, top_k_R.unsqueeze(1) - 1)
    return logits_RV.masked_fill(logits_RV < threshold_R1, -torch.inf)


def mask_top_p(logits_RV: torch.Tensor, top_p_R: torch.Tensor) -> torch.Tensor:
    """Set tokens to -inf outside the smallest set whose probability reaches ``top_p``.

    From Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration". A token stays while
    the more likely ones add up to less than ``top_p``, so the most likely one always does; among
    equally likely ones the lower ids stay. Example: probabilities 0.5, 0.25, 0.25 with top_p 0.5
    keep one token, with top_p 0.51 two.

    Args:
        logits_RV: float32, with at least one finite value in a row.
        top_p_R: float64 in (0, 1].
    """
    sorted_RV, ids_RV = torch.sort(logits_RV, dim=-1, descending=True, stable=True)
    weights_RV = _fixed_point(torch.softmax(sorted_RV, dim=-1))
    sums_RV = weights_RV.cumsum(dim=-1)
    before_RV = sums_RV - weights_RV
    keep_RV = before_RV < top_p_R.unsqueeze(1) * sums_RV[:, -1:]
    return logits_RV.scatter(1, ids_RV, sorted_RV.masked_fill(~keep_RV, -torch.inf))


def draw_tokens(logits_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """Draw a token per row by the inverse of the cumulative distribution, in order of token ids.

    The token is the lowest id whose cumulative probability exceeds ``uniform`` times the total, so
    it has a probability above zero whatever ``uniform`` is.

    Args:
        logits_RV: float32, with at least one finite value in a row.
        uniform_R: float64 in [0, 1).

    Returns:
        int64 [R].
    """
    sums_RV = _fixed_point(torch.softmax(logits_RV, dim=-1)).cumsum(dim=-1)
    # A float64 below 1 is at most 1 - 2**-53, which takes more off the total than converting the
    # total to float64 can add, so the target stays below it and a cumulative sum exceeds it.
    target_R = (uniform_R * sums_RV[:, -1]).to(torch.int64)
    return torch.searchsorted(sums_RV, target_R.unsqueeze(1), right=True).squeeze(1)


def top_logprobs(
    logits_NV: torch.Tensor, token_ids_N: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of given tokens, their ranks, and the most likely tokens.

    Tokens are ranked by logit, equal ones by id, so rank r is place r of the top, and the greedy
    token has rank 1.

    Args:
        logits_NV: any float dtype; NaN counts as -inf.
        token_ids_N: int64.
        num_top: K, at most V.

    Returns:
        float32 [N] log-probabilities, int64 [N] ranks from 1, int64 [N, K] ids of the most likely
        tokens and their float32 [N, K] log-probabilities, best first.
    """
    logits_NV = _softmax_ready(to_float32_without_nan(logits_NV))
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    keys_NV = _rank_keys(logits_NV)
    token_ids_N1 = token_ids_N.unsqueeze(1)
    ranks_N = (keys_NV > keys_NV.gather(1, token_ids_N1)).sum(dim=-1) + 1
    top_ids_NK = torch.topk(keys_NV, num_top, dim=-1).indices
    return (
        logprobs_NV.gather(1, token_ids_N1).squeeze(1),
        ranks_N,
        top_ids_NK,
        logprobs_NV.gather(1, top_ids_NK),
    )


def _softmax_ready(logits_RV: torch.Tensor) -> torch.Tensor:
    """Replace what a softmax would turn into NaN.

    +inf becomes the largest float32. A row of -inf alone, which leaves nothing to choose, becomes
    certain of token 0, the one that `greedy_tokens` takes there.
    """
    logits_RV = logits_RV.clamp(max=_FLOAT32_MAX)
    hopeless_R = logits_RV.amax(dim=-1) == -torch.inf
    logits_RV[:, 0].masked_fill_(hopeless_R, 0.0)
    return logits_RV


def _fixed_point(probs_RV: torch.Tensor) -> torch.Tensor:
    """Probabilities as int64 multiples of 2**-60."""
    return (probs_RV.to(torch.float64) * _FIXED_POINT_ONE).to(torch.int64)


def _rank_keys(logits_NV: torch.Tensor) -> torch.Tensor:
    """Distinct int64 keys that sort like (logit, -id); no NaN.

    The bits of a float, read as a signed integer, sort like the float if it is positive, and the
    other way round if it is negative, where flipping all bits but the sign repairs the order.
    """
    # Adding 0.0 turns -0.0 into 0.0, which compare equal but have other bits.
    bits_NV = (logits_NV + 0.0).view(torch.int32).to(torch.int64)
    bits_NV = torch.where(bits_NV < 0, bits_NV ^ 0x7FFFFFFF, bits_NV)
    ids_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    return bits_NV * 2**32 - ids_V
