"""The CUDA kernels for Hopper: experts, linear layers of few rows, the norm with the router.

Whether they take given arguments, and their launches, which pass addresses on unchecked. The
callers are `ops.moe` and `ops.linear`, which have checked that shapes and dtypes fit together;
what else the kernels need, dtypes and alignment above all, the `takes_` functions check. Attention
is in `ops.decode_attention` and `ops.prefill_attention`.

Shape legend: R rows, H hidden size, E local experts, K experts per row, P = R × K pairs,
I intermediate size, J = 2 × I, X input width, O output width, S parts of the depth X.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from moe_engine.ops import native, tuning

LINEAR_MAX_ROWS = 16
"""Rows that the streaming linear layer takes."""
SPLIT_LINEAR_MAX_ROWS = 64
"""Rows that the split linear layer takes."""


@functools.cache
def extension(device: torch.device) -> ModuleType | None:
    """`moe_engine._C` where its Hopper kernels run: on compute capability 9.0."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    return native.cuda_extension(device)


def takes_experts(x_RH: torch.Tensor, gate_up_EJH: torch.Tensor, down_EHI: torch.Tensor) -> bool:
    """Whether the experts' kernels take these rows and weights."""
    doubled, hidden = gate_up_EJH.shape[1:]
    return (
        x_RH.dtype == torch.bfloat16
        and _is_packed(gate_up_EJH, x_RH.device)
        and _is_packed(down_EHI, x_RH.device)
        and hidden % 64 == 0
        and doubled % 128 == 0
        and gate_up_EJH.shape[0] <= 1024
        and rows_are_aligned(x_RH)
        and extension(x_RH.device) is not None
    )


def takes_streaming_experts(top_k: int, down_EHI: torch.Tensor, num_rows: int) -> bool:
    """Whether the streaming kernel takes these sizes; `takes_experts` has said yes."""
    if not _is_packed(down_EHI, down_EHI.device):
        return False
    library = extension(down_EHI.device)
    assert library is not None
    with torch.cuda.device(down_EHI.device):
        fits: bool = library.streaming_experts_fit(
            num_tokens=num_rows,
            top_k=top_k,
            hidden=down_EHI.shape[1],
            intermediate=down_EHI.shape[2],
        )
    return fits


def takes_linear(x_RX: torch.Tensor, weight_OX: torch.Tensor) -> bool:
    """Whether the streaming linear kernel is best for these rows and takes this weight."""
    if not (len(x_RX) <= LINEAR_MAX_ROWS and _is_best("streaming", x_RX, weight_OX)):
        return False
    library = extension(x_RX.device)
    return library is not None and library.streaming_linear_fits(
        in_features=weight_OX.shape[1], out_features=weight_OX.shape[0]
    )


def takes_split_linear(x_RX: torch.Tensor, weight_OX: torch.Tensor) -> bool:
    """Whether the split linear kernel is best for these rows and takes this weight."""
    if not (len(x_RX) <= SPLIT_LINEAR_MAX_ROWS and _is_best("split", x_RX, weight_OX)):
        return False
    library = extension(x_RX.device)
    return library is not None and _num_splits(library, weight_OX) > 0


def _is_best(kernel: str, x_RX: torch.Tensor, weight_OX: torch.Tensor) -> bool:
    """Whether this linear kernel is best, if rows and weight are as each of ours needs them."""
    if x_RX.dtype != torch.bfloat16:
        return False
    if not (rows_are_aligned(x_RX) and _is_packed(weight_OX, x_RX.device)):
        return False
    out_features, in_features = weight_OX.shape
    chosen = tuning.choices(tuning.LinearChoices, weight_OX.device, in_features, out_features)
    return tuning.pick(chosen.kernels, len(x_RX)) == kernel


def _num_splits(library: ModuleType, weight_OX: torch.Tensor) -> int:
    with torch.cuda.device(weight_OX.device):
        num_splits: int = library.split_linear_splits(
            in_features=weight_OX.shape[1], out_features=weight_OX.shape[0]
        )
    return num_splits


def takes_norm_router(
    x: torch.Tensor,
    residual_RH: torch.Tensor,
    norm_weight_H: torch.Tensor,
    gate_EH: torch.Tensor,
    top_k: int,
) -> bool:
    """Whether the kernel of norm and router is best for these rows and takes them and the weights.

    Args:
        x: [R, H], or parts of it [S, R, H].
    """
    num_experts, hidden = gate_EH.shape
    chosen = tuning.choices(tuning.NormRouterChoices, gate_EH.device, hidden, num_experts)
    if tuning.pick(chosen.kernels, len(residual_RH)) != "fused":
        return False
    device = residual_RH.device
    if not all(_is_packed(t, device) for t in (residual_RH, norm_weight_H, gate_EH)):
        return False
    if x.dtype != (torch.float32 if x.dim() == 3 else torch.bfloat16):
        return False
    # The launch copies rows that do not lie one after the other.
    if x.device != device or x.data_ptr() % 16 != 0:
        return False
    library = extension(device)
    return library is not None and library.norm_router_fits(
        num_experts=num_experts, hidden=hidden, top_k=top_k
    )


def sorts_pairs(slot_ids_RK: torch.Tensor, num_experts: int, tokens_per_tile: int) -> bool:
    """Whether the grouped kernels sort so few pairs themselves; `takes_experts` has said yes."""
    library = extension(slot_ids_RK.device)
    assert library is not None
    sorts: bool = library.grouped_experts_sort(
        num_pairs=slot_ids_RK.numel(), num_experts=num_experts, tokens_per_tile=tokens_per_tile
    )
    return sorts


def grouped_expert_ffn(
    x_RH: torch.Tensor,
    slot_ids_RK: torch.Tensor,
    groups: tuple[torch.Tensor, torch.Tensor] | None,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
    tokens_per_tile: int,
) -> torch.Tensor:
    """Each pair's expert output, bfloat16 [P, H]; rows of pairs without an expert are undefined.

    Args:
        slot_ids_RK: contiguous int32, below 0 for no expert.
        groups: offsets int32 [E + 1] and pairs int32 [P], see `ops.moe.ExpertGroups`; None: the
            kernels sort the pairs, of which `sorts_pairs` must say yes.
        tokens_per_tile: 16, 32, 64, 128 or 256; how many pairs of an expert share a read of its
            weights.
    """
    from moe_engine.kernels.launch import arrival_counters, compiles_only

    num_experts, hidden, intermediate = down_EHI.shape
    num_pairs = slot_ids_RK.numel()
    h_PI = x_RH.new_empty(num_pairs, intermediate)
    y_PH = x_RH.new_empty(num_pairs, hidden)
    if compiles_only():
        return y_PH  # nobody has written the ids
    library = extension(x_RH.device)
    assert library is not None
    with torch.cuda.device(x_RH.device):
        library.grouped_expert_ffn(
            expert_ids=slot_ids_RK.data_ptr() if groups is None else 0,
            offsets=0 if groups is None else groups[0].data_ptr(),
            pairs=0 if groups is None else groups[1].data_ptr(),
            x=x_RH.data_ptr(),
            x_stride=x_RH.stride(0),
            gate_up=gate_up_EJH.data_ptr(),
            down=down_EHI.data_ptr(),
            h=h_PI.data_ptr(),
            y=y_PH.data_ptr(),
            counters=arrival_counters(x_RH.device).data_ptr(),
            num_pairs=num_pairs,
            num_experts=num_experts,
            top_k=slot_ids_RK.shape[1],
            hidden=hidden,
            intermediate=intermediate,
            tokens_per_tile=tokens_per_tile,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return y_PH


def streaming_expert_ffn(
    x_RH: torch.Tensor,
    slot_ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
) -> torch.Tensor:
    """`ops.moe.expert_ffn` for very few rows, which read their experts each for itself."""
    from moe_engine.kernels.launch import arrival_counters, compiles_only

    _, hidden, intermediate = down_EHI.shape
    h_PI = x_RH.new_empty(slot_ids_RK.numel(), intermediate)
    out_RH = x_RH.new_empty(x_RH.shape[0], hidden)
    if compiles_only():
        return out_RH  # nobody has written the ids
    library = extension(x_RH.device)
    assert library is not None
    with torch.cuda.device(x_RH.device):
        library.streaming_expert_ffn(
            expert_ids=slot_ids_RK.data_ptr(),
            expert_weights=weights_RK.data_ptr(),
            x=x_RH.data_ptr(),
            x_stride=x_RH.stride(0),
            gate_up=gate_up_EJH.data_ptr(),
            down=down_EHI.data_ptr(),
            h=h_PI.data_ptr(),
            out=out_RH.data_ptr(),
            counters=arrival_counters(x_RH.device).data_ptr(),
            num_tokens=x_RH.shape[0],
            top_k=slot_ids_RK.shape[1],
            hidden=hidden,
            intermediate=intermediate,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return out_RH


def linear(x_RX: torch.Tensor, weight_OX: torch.Tensor) -> torch.Tensor:
    """``x weight^T`` of at most `LINEAR_MAX_ROWS` rows, bfloat16 [R, O]."""
    num_rows, in_features = x_RX.shape
    out_RO = x_RX.new_empty(num_rows, weight_OX.shape[0])
    library = extension(x_RX.device)
    assert library is not None
    with torch.cuda.device(x_RX.device):
        library.streaming_linear(
            x=x_RX.data_ptr(),
            x_stride=x_RX.stride(0),
            weight=weight_OX.data_ptr(),
            out=out_RO.data_ptr(),
            num_tokens=num_rows,
            in_features=in_features,
            out_features=weight_OX.shape[0],
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return out_RO


def split_linear(x_RX: torch.Tensor, weight_OX: torch.Tensor) -> torch.Tensor:
    """Products over equal parts of the depth, float32 [S, R, O], whose sum is ``x weight^T``."""
    num_rows, in_features = x_RX.shape
    library = extension(x_RX.device)
    assert library is not None
    parts_SRO = x_RX.new_empty(
        _num_splits(library, weight_OX), num_rows, weight_OX.shape[0], dtype=torch.float32
    )
    with torch.cuda.device(x_RX.device):
        library.split_linear(
            x=x_RX.data_ptr(),
            x_stride=x_RX.stride(0),
            weight=weight_OX.data_ptr(),
            parts=parts_SRO.data_ptr(),
            num_tokens=num_rows,
            in_features=in_features,
            out_features=weight_OX.shape[0],
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return parts_SRO


def norm_router(
    x: torch.Tensor,
    residual_RH: torch.Tensor,
    norm_weight_H: torch.Tensor,
    eps: float,
    gate_EH: torch.Tensor,
    top_k: int,
    normalize: bool,
    num_real_1: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.moe.norm_and_route` for few rows.

    Args:
        x: bfloat16 [R, H], or parts of it, float32 [S, R, H].
    """
    num_rows = residual_RH.shape[0]
    x = x.contiguous()
    normed_RH = torch.empty_like(residual_RH)
    new_residual_RH = torch.empty_like(residual_RH)
    ids_RK = residual_RH.new_empty(num_rows, top_k, dtype=torch.int32)
    weights_RK = residual_RH.new_empty(num_rows, top_k, dtype=torch.float32)
    library = extension(residual_RH.device)
    assert library is not None
    with torch.cuda.device(residual_RH.device):
        library.norm_router(
            x=x.data_ptr(),
            num_parts=len(x) if x.dim() == 3 else 0,
            residual=residual_RH.data_ptr(),
            norm_weight=norm_weight_H.data_ptr(),
            gate=gate_EH.data_ptr(),
            num_real_1=0 if num_real_1 is None else num_real_1.data_ptr(),
            normed=normed_RH.data_ptr(),
            new_residual=new_residual_RH.data_ptr(),
            expert_ids=ids_RK.data_ptr(),
            expert_weights=weights_RK.data_ptr(),
            eps=eps,
            num_tokens=num_rows,
            num_experts=gate_EH.shape[0],
            hidden=gate_EH.shape[1],
            top_k=top_k,
            normalize=normalize,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return normed_RH, new_residual_RH, ids_RK, weights_RK


def rows_are_aligned(x: torch.Tensor) -> bool:
    """Whether the rows lie side by side in themselves and begin at multiples of 16 bytes."""
    return x.stride(-1) == 1 and x.stride(-2) % 8 == 0 and x.data_ptr() % 16 == 0


def _is_packed(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether it is bfloat16 without gaps, beginning at a multiple of 16 bytes, on the device."""
    return (
        tensor.dtype == torch.bfloat16
        and tensor.device == device
        and tensor.is_contiguous()
        and tensor.data_ptr() % 16 == 0
    )
