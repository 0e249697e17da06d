"""Router and expert feed-forward operators.

The experts' feed-forward has several implementations (`EXPERT_FFNS`), among which
`choose_expert_ffn` picks by device and batch.

Shape legend: T tokens, R rows, H hidden size, E experts or local expert slots, K experts per token,
P = R × K pairs of a row and one of its experts, I intermediate size, J = 2 × I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_engine.ops import hopper, native, norm, tuning
from moe_engine.ops.linear import MANY_ROWS, AddedOutput, SplitSums
from moe_engine.ops.reference import moe as reference
from moe_engine.ops.reference import norm as norm_reference

# What the kernels take; any other dtype runs on the reference.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExpertGroups:
    """Pairs (row, choice), numbered row × K + choice, sorted by expert.

    Attributes:
        offsets_E1: int32 [E + 1], where each expert's pairs begin, then how many there are.
        pairs_P: int32 [P], pair numbers in increasing order within an expert; what lies past the
            last offset is arbitrary.
    """

    offsets_E1: torch.Tensor
    pairs_P: torch.Tensor


@dataclass(frozen=True)
class ExpertOutputs:
    """Each row's weighted sum of its K outputs, not taken yet: the norm that follows can take it.

    Attributes:
        y_PH: an expert's output for each pair.
        slot_ids_RK: outputs whose id is below 0 are left out, whatever they hold.
        weights_RK: float32.
    """

    y_PH: torch.Tensor
    slot_ids_RK: torch.Tensor
    weights_RK: torch.Tensor


MoEOutput = torch.Tensor | ExpertOutputs | norm.PendingRows
"""[T, H], or what is still to be summed to that."""


def summed(rows: MoEOutput) -> torch.Tensor:
    """The rows [R, H], after the sum if it has not been taken yet."""
    if isinstance(rows, torch.Tensor):
        return rows
    if isinstance(rows, norm.PendingRows):
        return rows.rows()
    return sum_choices(rows.y_PH, rows.slot_ids_RK, rows.weights_RK)


def route(
    x_TH: torch.Tensor,
    router_EH: torch.Tensor,
    top_k: int,
    normalize: bool,
    num_tokens_1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K experts of every token: ids int32 [T, K], best first, and weights float32 [T, K].

    Args:
        router_EH: the gate's weight.
        normalize: whether the weights of a token are scaled to sum to 1.
        num_tokens_1: int32 [1] on the device; the rows from there on are padding, with ids -1 and
            weights 0. None: there is no padding.
    """
    _check_router(x_TH, router_EH, top_k, num_tokens_1)
    if _runs_triton(x_TH):
        from moe_engine.kernels import router as kernels

        with torch.cuda.device(x_TH.device):
            ids_TK, weights_TK = kernels.route(
                x_TH, router_EH.contiguous(), top_k, normalize, num_tokens_1
            )
        return ids_TK, weights_TK
    return reference.route(x_TH, router_EH, top_k, normalize, num_tokens_1)


def norm_and_route(
    x: torch.Tensor | SplitSums | AddedOutput,
    residual_TH: torch.Tensor,
    norm_weight_H: torch.Tensor,
    eps: float,
    router_EH: torch.Tensor,
    top_k: int,
    normalize: bool,
    num_tokens_1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.norm.add_rms_norm`, then `route` of what was normalised; for few or many rows in one.

    That one launch takes the logits of the norm before it is rounded, so experts that are all but
    equally likely may come out in another order than from the two operators.

    Args:
        x: [T, H], what is still to be summed to that, or the residual stream that has it already,
            in place of ``residual_TH``.

    Returns:
        ``(normed, new_residual, ids, weights)``.
    """
    stream_TH = x.stream_TO if isinstance(x, AddedOutput) else residual_TH
    assert norm_weight_H.shape == stream_TH.shape[1:], (norm_weight_H.shape, stream_TH.shape)
    assert norm_weight_H.dtype == stream_TH.dtype, (norm_weight_H.dtype, stream_TH.dtype)
    _check_router(stream_TH, router_EH, top_k, num_tokens_1)
    if isinstance(x, SplitSums):
        assert x.parts_STO.shape[1:] == residual_TH.shape, (x.parts_STO.shape, residual_TH.shape)
        assert x.parts_STO.dtype == torch.float32, x.parts_STO.dtype
        assert x.dtype == residual_TH.dtype, (x.dtype, residual_TH.dtype)
    elif isinstance(x, torch.Tensor):
        assert x.shape == residual_TH.shape, (x.shape, residual_TH.shape)
        assert x.dtype == residual_TH.dtype, (x.dtype, residual_TH.dtype)
    router = (router_EH, top_k, normalize, num_tokens_1)
    if isinstance(x, AddedOutput):
        if _takes_many_rows(x.stream_TO, router_EH):
            return _norm_router(None, x.stream_TO, norm_weight_H, eps, *router)
        normed_TH, new_residual_TH = norm.rms_norm(x.stream_TO, norm_weight_H, eps), x.stream_TO
    elif residual_TH.is_cuda and hopper.takes_norm_router(
        parts := x.parts_STO if isinstance(x, SplitSums) else x,
        residual_TH,
        norm_weight_H,
        router_EH,
        top_k,
    ):
        return hopper.norm_router(parts, residual_TH, norm_weight_H, eps, *router)
    elif isinstance(x, SplitSums):
        normed_TH, new_residual_TH = norm.split_add_rms_norm(x, residual_TH, norm_weight_H, eps)
    elif _takes_many_rows(residual_TH, router_EH):
        return _norm_router(x, residual_TH, norm_weight_H, eps, *router)
    else:
        normed_TH, new_residual_TH = norm.add_rms_norm(x, residual_TH, norm_weight_H, eps)
    ids_TK, weights_TK = route(normed_TH, *router)
    return normed_TH, new_residual_TH, ids_TK, weights_TK


def _takes_many_rows(residual_TH: torch.Tensor, router_EH: torch.Tensor) -> bool:
    """Whether norm and router of these rows are one launch of `kernels.norm_router`."""
    if len(residual_TH) <= MANY_ROWS or not _runs_triton(residual_TH):
        return False
    from moe_engine.kernels import norm_router as kernels

    takes: bool = kernels.takes(residual_TH, len(router_EH))
    return takes


def _norm_router(
    x_TH: torch.Tensor | None,
    residual_TH: torch.Tensor,
    norm_weight_H: torch.Tensor,
    eps: float,
    router_EH: torch.Tensor,
    top_k: int,
    normalize: bool,
    num_tokens_1: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`norm_and_route` of many rows; without ``x_TH`` their residual stream has it already."""
    from moe_engine.kernels import norm_router as kernels

    with torch.cuda.device(residual_TH.device):
        normed_TH, new_residual_TH, ids_TK, weights_TK = kernels.norm_router(
            x_TH, residual_TH, norm_weight_H, eps, router_EH, top_k, normalize, num_tokens_1
        )
    return normed_TH, new_residual_TH, ids_TK, weights_TK


def group_by_expert(slot_ids_RK: torch.Tensor, num_experts: int) -> ExpertGroups:
    """Sort the pairs by expert slot, leaving out ids below 0; nothing waits for the device."""
    if slot_ids_RK.is_cuda and native.has_triton():
        from moe_engine.kernels import expert_grouping as kernels

        with torch.cuda.device(slot_ids_RK.device):
            return ExpertGroups(
                *kernels.group_by_expert(_int32_ids(slot_ids_RK).view(-1), num_experts)
            )
    return ExpertGroups(*reference.group_by_expert(slot_ids_RK, num_experts))


def expert_ffn(
    x_RH: torch.Tensor,
    slot_ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
    expected_pairs: int | None = None,
) -> torch.Tensor | ExpertOutputs:
    """Weighted sum of each row's local experts; see `ops.reference.moe.expert_ffn`.

    Where the implementation would need one more launch for the sum, it is left to the caller, who
    takes it with `summed` or `sum_add_rms_norm`.

    Args:
        expected_pairs: slots that are not below 0, on average and at least 1, by which the
            implementation is chosen; None: all.
    """
    num_slots, doubled, hidden = gate_up_EJH.shape
    assert x_RH.shape == (slot_ids_RK.shape[0], hidden), (x_RH.shape, gate_up_EJH.shape)
    assert down_EHI.shape == (num_slots, hidden, doubled // 2), down_EHI.shape
    assert x_RH.dtype == gate_up_EJH.dtype == down_EHI.dtype, (gate_up_EJH.dtype, down_EHI.dtype)
    assert gate_up_EJH.is_contiguous(), gate_up_EJH.stride()
    assert down_EHI.is_contiguous(), down_EHI.stride()
    assert slot_ids_RK.shape == weights_RK.shape, (slot_ids_RK.shape, weights_RK.shape)
    assert weights_RK.dtype == torch.float32, weights_RK.dtype
    if expected_pairs is None:
        expected_pairs = slot_ids_RK.numel()
    chosen = choose_expert_ffn(x_RH, slot_ids_RK, gate_up_EJH, down_EHI, expected_pairs)
    return EXPERT_FFNS[chosen](x_RH, slot_ids_RK, weights_RK, gate_up_EJH, down_EHI, expected_pairs)


def sum_choices(
    y_PH: torch.Tensor, slot_ids_RK: torch.Tensor, weights_RK: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of each row's K outputs in float32, in order of choice; [R, H] in y's dtype.

    Args:
        y_PH: an expert's output for each pair.
        slot_ids_RK: outputs whose id is below 0 are left out, whatever they hold.
        weights_RK: float32.
    """
    _check_choices(y_PH, slot_ids_RK, weights_RK)
    if _runs_triton(y_PH):
        from moe_engine.kernels import combine as kernels

        with torch.cuda.device(y_PH.device):
            summed_RH: torch.Tensor = kernels.sum_choices(
                y_PH.contiguous(), _int32_ids(slot_ids_RK), weights_RK.contiguous()
            )
        return summed_RH
    return reference.sum_choices(y_PH, slot_ids_RK, weights_RK)


def sum_add_rms_norm(
    outputs: ExpertOutputs,
    residual_RH: torch.Tensor,
    norm_weight_H: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.norm.add_rms_norm` of `summed`, in one launch.

    Returns:
        ``(normed, new_residual)``, two new tensors [R, H].
    """
    y_PH, slot_ids_RK, weights_RK = outputs.y_PH, outputs.slot_ids_RK, outputs.weights_RK
    _check_choices(y_PH, slot_ids_RK, weights_RK)
    hidden = y_PH.shape[1]
    assert residual_RH.shape == (slot_ids_RK.shape[0], hidden), (residual_RH.shape, y_PH.shape)
    assert norm_weight_H.shape == (hidden,), (norm_weight_H.shape, y_PH.shape)
    if _runs_triton(y_PH):
        from moe_engine.kernels import combine as kernels

        with torch.cuda.device(y_PH.device):
            normed_RH, new_residual_RH = kernels.sum_add_rms_norm(
                y_PH.contiguous(),
                _int32_ids(slot_ids_RK),
                weights_RK.contiguous(),
                residual_RH,
                norm_weight_H,
                eps,
            )
        return normed_RH, new_residual_RH
    summed_RH = reference.sum_choices(y_PH, slot_ids_RK, weights_RK)
    return norm_reference.add_rms_norm(summed_RH, residual_RH, norm_weight_H, eps)


def choose_expert_ffn(
    x_RH: torch.Tensor,
    slot_ids_RK: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
    expected_pairs: int,
) -> str:
    """The name of the implementation that is best for these arguments of `expert_ffn`."""
    if not _runs_triton(x_RH):
        return "reference"
    if not hopper.takes_experts(x_RH, gate_up_EJH, down_EHI):
        return "triton"
    num_rows, top_k = slot_ids_RK.shape
    kernel = tuning.pick(_choices(down_EHI, top_k).kernels, expected_pairs / top_k)
    if kernel == "streaming" and not hopper.takes_streaming_experts(top_k, down_EHI, num_rows):
        return "grouped"
    return kernel


def _triton_expert_ffn(
    x_RH: torch.Tensor,
    slot_ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
    expected_pairs: int,
) -> torch.Tensor | ExpertOutputs:
    """Grouping and two grouped matrix products; runs wherever Triton does."""
    from moe_engine.kernels import expert_ffn as kernels

    if slot_ids_RK.numel() == 0:
        return torch.zeros_like(x_RH)
    if x_RH.stride(1) != 1:
        x_RH = x_RH.contiguous()
    num_experts, top_k = gate_up_EJH.shape[0], slot_ids_RK.shape[1]
    groups = group_by_expert(slot_ids_RK, num_experts)
    offsets_E1, pairs_P = groups.offsets_E1, groups.pairs_P
    config = kernels.config_for(expected_pairs, num_experts, x_RH.dtype)
    with torch.cuda.device(x_RH.device):
        h_PI = kernels.gate_up(x_RH, gate_up_EJH, offsets_E1, pairs_P, top_k, config.gate_up)
        y_PH = kernels.down(h_PI, down_EHI, offsets_E1, pairs_P, config.down)
    return ExpertOutputs(y_PH, slot_ids_RK, weights_RK)


def tokens_per_tile(down_EHI: torch.Tensor, top_k: int, expected_pairs: int) -> int:
    """The tile of `hopper.grouped_expert_ffn` that is best for so many pairs."""
    mean_pairs = expected_pairs / down_EHI.shape[0]
    return tuning.pick(_choices(down_EHI, top_k).tiles, mean_pairs)


def _choices(down_EHI: torch.Tensor, top_k: int) -> tuning.ExpertChoices:
    num_experts, hidden, intermediate = down_EHI.shape
    shape = (hidden, intermediate, num_experts, top_k)
    return tuning.choices(tuning.ExpertChoices, down_EHI.device, *shape)


def _grouped_expert_ffn(
    x_RH: torch.Tensor,
    slot_ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
    expected_pairs: int,
) -> ExpertOutputs:
    """Grouping, and the two products on Hopper's tensor cores, which group few pairs themselves."""
    num_experts = gate_up_EJH.shape[0]
    slot_ids_RK = _int32_ids(slot_ids_RK)
    tile = tokens_per_tile(down_EHI, slot_ids_RK.shape[1], expected_pairs)
    groups = None
    if not hopper.sorts_pairs(slot_ids_RK, num_experts, tile):
        sorted_pairs = group_by_expert(slot_ids_RK, num_experts)
        groups = sorted_pairs.offsets_E1, sorted_pairs.pairs_P
    y_PH = hopper.grouped_expert_ffn(x_RH, slot_ids_RK, groups, gate_up_EJH, down_EHI, tile)
    return ExpertOutputs(y_PH, slot_ids_RK, weights_RK)


def _streaming_expert_ffn(
    x_RH: torch.Tensor,
    slot_ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
    expected_pairs: int,
) -> torch.Tensor:
    """No grouping: every row reads its experts for itself."""
    return hopper.streaming_expert_ffn(
        x_RH, _int32_ids(slot_ids_RK), weights_RK.contiguous(), gate_up_EJH, down_EHI
    )


def _reference_expert_ffn(
    x_RH: torch.Tensor,
    slot_ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
    expected_pairs: int,
) -> torch.Tensor:
    """Expert by expert."""
    return reference.expert_ffn(x_RH, slot_ids_RK, weights_RK, gate_up_EJH, down_EHI)


ExpertFFN = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int],
    torch.Tensor | ExpertOutputs,
]

# Implementations of `expert_ffn`, which checks the arguments, by name.
EXPERT_FFNS: dict[str, ExpertFFN] = {
    "reference": _reference_expert_ffn,
    "triton": _triton_expert_ffn,
    "grouped": _grouped_expert_ffn,
    "streaming": _streaming_expert_ffn,
}


def _check_router(
    x_TH: torch.Tensor, router_EH: torch.Tensor, top_k: int, num_tokens_1: torch.Tensor | None
) -> None:
    assert x_TH.shape[1:] == router_EH.shape[1:], (x_TH.shape, router_EH.shape)
    assert x_TH.dtype == router_EH.dtype, (x_TH.dtype, router_EH.dtype)
    assert 1 <= top_k <= router_EH.shape[0], (top_k, router_EH.shape)
    assert num_tokens_1 is None or num_tokens_1.dtype == torch.int32, num_tokens_1.dtype
    assert num_tokens_1 is None or num_tokens_1.shape == (1,), num_tokens_1.shape


def _check_choices(y_PH: torch.Tensor, slot_ids_RK: torch.Tensor, weights_RK: torch.Tensor) -> None:
    assert y_PH.shape[0] == slot_ids_RK.numel(), (y_PH.shape, slot_ids_RK.shape)
    assert weights_RK.shape == slot_ids_RK.shape, (weights_RK.shape, slot_ids_RK.shape)
    assert weights_RK.dtype == torch.float32, weights_RK.dtype


def _runs_triton(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype in KERNEL_DTYPES and native.has_triton()


def _int32_ids(ids: torch.Tensor) -> torch.Tensor:
    """``ids`` as contiguous int32, the same tensor if it is that already."""
    return ids.to(torch.int32).contiguous()
