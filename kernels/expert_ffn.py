"""The experts' feed-forward as two grouped matrix products; runs wherever Triton does.

Legend: R rows, K experts per row, P = R * K pairs (pair r * K + k is choice k of row r), E local
expert slots, H hidden size, I intermediate size.

1. `_gate_up_kernel`: h = silu(x @ gate^T) * (x @ up^T) for the pairs in the order of their experts,
   whose rows of x are fetched by index.
2. `_down_kernel`: y = h @ down^T, stored at the pair's own number, where
   `moe_engine.kernels.combine` finds the K pairs of a row side by side.

How many pairs an expert has is known on the device only. The grid is sized by an upper bound, and
each program finds its tile in the experts' offsets; those past the last tile end at once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import launch_kernel, shared_bytes, supports_pdl


@dataclass(frozen=True)
class GemmConfig:
    """How one of the two products is cut up.

    Attributes:
        block_m, block_n, block_k: pairs, output columns and inner columns of a tile.
        swap: multiply weight by input instead of input by weight: the matrix unit then takes its
            64 rows from the weight, so a tile may have few pairs.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False


@dataclass(frozen=True)
class FfnConfig:
    """Both products' configurations."""

    gate_up: GemmConfig
    down: GemmConfig


# (mean pairs up to, of an expert that has any; configuration), for 16-bit types.
CONFIGS = (
    (
        6,
        FfnConfig(
            GemmConfig(16, 64, 128, 4, 3, swap=True),
            GemmConfig(16, 128, 128, 4, 3, swap=True),
        ),
    ),
    (
        20,
        FfnConfig(
            GemmConfig(32, 64, 128, 4, 3, swap=True),
            GemmConfig(32, 64, 128, 4, 3, swap=True),
        ),
    ),
    (
        48,
        FfnConfig(
            GemmConfig(64, 64, 128, 4, 3),
            GemmConfig(64, 128, 64, 4, 4),
        ),
    ),
)
LARGE_CONFIG = FfnConfig(GemmConfig(128, 128, 64, 8, 4), GemmConfig(128, 256, 64, 8, 3))
FLOAT32_CONFIG = FfnConfig(GemmConfig(32, 32, 32, 4, 2), GemmConfig(32, 32, 32, 4, 2))


def config_for(num_pairs: int, num_experts: int, dtype: torch.dtype) -> FfnConfig:
    """The configuration for a batch, from what the host knows of it."""
    if dtype == torch.float32:
        return FLOAT32_CONFIG
    mean_pairs = num_pairs / min(num_pairs, num_experts)
    return next((config for limit, config in CONFIGS if mean_pairs <= limit), LARGE_CONFIG)


def fitting_stages(config: GemmConfig, num_weights: int, room: int, holds_last: bool) -> int:
    """Stages of a tile's loop over inner columns of 16 bits: as configured, or as many as fit.

    Args:
        num_weights: that a program multiplies by, 2 for gate and up.
        room: bytes of shared memory that a program may have.
        holds_last: the last stage needs a buffer, too, because the matrix unit reads weights and
            input from shared memory (compute capability 9.0 and 10.0) instead of registers.

    Example: 128 x 128 x 64 of gate and up take 48 KiB a stage, so the 4 of `LARGE_CONFIG` have room
    in the 227 KiB of an H100 and, one buffer less, in the 163 of an A100; in the 99 of an L40S 3.
    """
    stage_bytes = 2 * config.block_k * (config.block_m + num_weights * config.block_n)
    most = room // stage_bytes + (0 if holds_last else 1)
    return max(1, min(config.num_stages, most))


@triton.jit
def _find_tile(
    offsets_ptr,
    program,
    num_experts,
    TILES_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PADDED_E: tl.constexpr,
):
    """A program's tile: (expert, first pair, end of the expert's pairs, tile along N).

    An expert's tiles are numbered along M first, so that programs that run side by side share a
    tile of the weight. The expert is `num_experts` or more where there is no tile left.

    Example: offsets = [0, 3, 3, 5], BLOCK_M = 2, TILES_N = 2: experts 0, 1, 2 have 4, 0, 2 tiles.
    Program 1 is expert 0, pairs from 2 on, column tile 0; 5 is expert 2, pair 3, column tile 1.
    """
    experts_E = tl.arange(0, PADDED_E)
    is_expert_E = experts_E < num_experts
    starts_E = tl.load(offsets_ptr + experts_E, mask=is_expert_E, other=0)
    ends_E = tl.load(offsets_ptr + experts_E + 1, mask=is_expert_E, other=0)
    tiles_E = tl.cdiv(ends_E - starts_E, BLOCK_M) * TILES_N
    last_tiles_E = tl.cumsum(tiles_E, axis=0)
    is_before_E = last_tiles_E <= program
    expert = tl.sum(is_before_E.to(tl.int32), axis=0)
    first_tile = tl.max(tl.where(is_before_E, last_tiles_E, 0), axis=0)
    start = tl.sum(tl.where(experts_E == expert, starts_E, 0), axis=0)
    end = tl.sum(tl.where(experts_E == expert, ends_E, 0), axis=0)
    tiles_m = tl.maximum(tl.cdiv(end - start, BLOCK_M), 1)
    tile = program - first_tile
    return expert, start + (tile % tiles_m) * BLOCK_M, end, tile // tiles_m


@triton.jit
def _gate_up_kernel(
    x_ptr,
    gate_up_ptr,
    offsets_ptr,
    pairs_ptr,
    h_ptr,
    num_experts,
    x_row_stride,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    PADDED_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One tile of h, BLOCK_M pairs of one expert by BLOCK_N columns.

    Shapes: x [R, H] with a row stride; gate_up [E, 2 * I, H], gate rows first; offsets int32
    [E + 1] and pairs int32 [P] as of `group_by_expert`; h [P, I] in the order of ``pairs``.

    Example, H = I = 1, one expert with gate = 1, up = 2, TOP_K = 2, pairs = [1, 2], x = [1, 3]:
    rows 0 and 1, so h = [silu(1) * 2, silu(3) * 6] = [1.462, 17.147].
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    TILES_N: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    expert, first, end, tile_n = _find_tile(
        offsets_ptr, tl.program_id(0), num_experts, TILES_N, BLOCK_M, PADDED_E
    )
    if expert < num_experts:
        positions_M = first + tl.arange(0, BLOCK_M)
        exists_M = positions_M < end
        rows_M = tl.load(pairs_ptr + positions_M, mask=exists_M, other=0) // TOP_K
        columns_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Past the end the last column is repeated; it is not stored.
        weight_rows_N = tl.minimum(columns_N, INTERMEDIATE - 1)
        inner_K = tl.arange(0, BLOCK_K)
        x_MK = x_ptr + rows_M.to(tl.int64)[:, None] * x_row_stride + inner_K[None, :]
        gate_ptr = gate_up_ptr + expert.to(tl.int64) * (2 * INTERMEDIATE * HIDDEN)
        gate_NK = gate_ptr + weight_rows_N[:, None] * HIDDEN + inner_K[None, :]

        if SWAP:
            gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        else:
            gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, HIDDEN, BLOCK_K):
            if HIDDEN % BLOCK_K == 0:
                x = tl.load(x_MK + k, mask=exists_M[:, None], other=0.0)
                w_gate = tl.load(gate_NK + k)
                w_up = tl.load(gate_NK + INTERMEDIATE * HIDDEN + k)
            else:
                is_inner_1K = (k + inner_K < HIDDEN)[None, :]
                x = tl.load(x_MK + k, mask=exists_M[:, None] & is_inner_1K, other=0.0)
                w_gate = tl.load(gate_NK + k, mask=is_inner_1K, other=0.0)
                w_up = tl.load(gate_NK + INTERMEDIATE * HIDDEN + k, mask=is_inner_1K, other=0.0)
            if SWAP:
                gate = tl.dot(w_gate, tl.trans(x), gate, input_precision="ieee")
                up = tl.dot(w_up, tl.trans(x), up, input_precision="ieee")
            else:
                gate = tl.dot(x, tl.trans(w_gate), gate, input_precision="ieee")
                up = tl.dot(x, tl.trans(w_up), up, input_precision="ieee")
        h = gate / (1.0 + tl.exp(-gate)) * up
        if SWAP:
            h = tl.trans(h)
        tl.store(
            h_ptr + positions_M.to(tl.int64)[:, None] * INTERMEDIATE + columns_N[None, :],
            h.to(h_ptr.dtype.element_ty),
            mask=exists_M[:, None] & (columns_N < INTERMEDIATE)[None, :],
        )


@triton.jit
def _down_kernel(
    h_ptr,
    down_ptr,
    offsets_ptr,
    pairs_ptr,
    y_ptr,
    num_experts,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    PADDED_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One tile of y, BLOCK_M pairs of one expert by BLOCK_N columns.

    Shapes: h [P, I] in the order of ``pairs``; down [E, H, I]; y [P, H] in the order of the pairs'
    numbers; the others as in `_gate_up_kernel`. Rows of y whose pair is in no expert stay as they
    are.

    Example, H = I = 1, one expert with down = 2, P = 4, pairs = [1, 2], h = [3, 4]:
    y = [unwritten, 6, 8, unwritten].
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    TILES_N: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    expert, first, end, tile_n = _find_tile(
        offsets_ptr, tl.program_id(0), num_experts, TILES_N, BLOCK_M, PADDED_E
    )
    if expert < num_experts:
        positions_M = first + tl.arange(0, BLOCK_M)
        exists_M = positions_M < end
        columns_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Past the end the last column is repeated; it is not stored.
        weight_rows_N = tl.minimum(columns_N, HIDDEN - 1)
        inner_K = tl.arange(0, BLOCK_K)
        h_MK = h_ptr + positions_M.to(tl.int64)[:, None] * INTERMEDIATE + inner_K[None, :]
        down_ptr += expert.to(tl.int64) * (HIDDEN * INTERMEDIATE)
        down_NK = down_ptr + weight_rows_N[:, None] * INTERMEDIATE + inner_K[None, :]

        if SWAP:
            y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        else:
            y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, INTERMEDIATE, BLOCK_K):
            if INTERMEDIATE % BLOCK_K == 0:
                h = tl.load(h_MK + k, mask=exists_M[:, None], other=0.0)
                w = tl.load(down_NK + k)
            else:
                is_inner_1K = (k + inner_K < INTERMEDIATE)[None, :]
                h = tl.load(h_MK + k, mask=exists_M[:, None] & is_inner_1K, other=0.0)
                w = tl.load(down_NK + k, mask=is_inner_1K, other=0.0)
            if SWAP:
                y = tl.dot(w, tl.trans(h), y, input_precision="ieee")
            else:
                y = tl.dot(h, tl.trans(w), y, input_precision="ieee")
        if SWAP:
            y = tl.trans(y)
        pairs_M = tl.load(pairs_ptr + positions_M, mask=exists_M, other=0)
        tl.store(
            y_ptr + pairs_M.to(tl.int64)[:, None] * HIDDEN + columns_N[None, :],
            y.to(y_ptr.dtype.element_ty),
            mask=exists_M[:, None] & (columns_N < HIDDEN)[None, :],
        )


def gate_up(
    x_RH: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    offsets_E1: torch.Tensor,
    pairs_P: torch.Tensor,
    top_k: int,
    config: GemmConfig,
) -> torch.Tensor:
    """h [P, I] in the order of ``pairs_P``; weights contiguous, ``x``'s columns side by side."""
    num_experts, doubled, hidden = gate_up_EJH.shape
    intermediate = doubled // 2
    num_pairs = pairs_P.shape[0]
    h_PI = torch.empty(num_pairs, intermediate, dtype=x_RH.dtype, device=x_RH.device)
    launch_kernel(
        _gate_up_kernel,
        _grid(num_pairs, num_experts, intermediate, config),
        x_RH,
        gate_up_EJH,
        offsets_E1,
        pairs_P,
        h_PI,
        num_experts,
        x_RH.stride(0),
        TOP_K=top_k,
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        **_options(num_experts, config, 2, x_RH.device),
    )
    return h_PI


def down(
    h_PI: torch.Tensor,
    down_EHI: torch.Tensor,
    offsets_E1: torch.Tensor,
    pairs_P: torch.Tensor,
    config: GemmConfig,
) -> torch.Tensor:
    """y [P, H] in the order of the pairs' numbers; everything contiguous."""
    num_experts, hidden, intermediate = down_EHI.shape
    num_pairs = pairs_P.shape[0]
    y_PH = torch.empty(num_pairs, hidden, dtype=h_PI.dtype, device=h_PI.device)
    launch_kernel(
        _down_kernel,
        _grid(num_pairs, num_experts, hidden, config),
        h_PI,
        down_EHI,
        offsets_E1,
        pairs_P,
        y_PH,
        num_experts,
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        **_options(num_experts, config, 1, h_PI.device),
    )
    return y_PH


def _grid(num_pairs: int, num_experts: int, columns: int, config: GemmConfig) -> tuple[int]:
    """At least as many programs as there can be tiles, however the pairs fall to the experts.

    An expert with c > 0 pairs has at most ``c // block_m + 1`` tiles along M.
    """
    tiles_m = num_pairs // config.block_m + min(num_pairs, num_experts)
    return (tiles_m * triton.cdiv(columns, config.block_n),)


def _options(
    num_experts: int, config: GemmConfig, num_weights: int, device: torch.device
) -> dict[str, object]:
    use_pdl = supports_pdl(device)
    return {
        "PADDED_E": triton.next_power_of_2(num_experts),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SWAP": config.swap,
        "USE_PDL": use_pdl,
        "num_warps": config.num_warps,
        "num_stages": _stages_on(device, config, num_weights),
        "launch_pdl": use_pdl,
    }


@functools.cache
def _stages_on(device: torch.device, config: GemmConfig, num_weights: int) -> int:
    room = shared_bytes(device)
    if room is None:
        return config.num_stages
    # `FLOAT32_CONFIG` takes twice what is counted, 24 KiB, for which there is room anywhere.
    holds_last = torch.cuda.get_device_capability(device)[0] in (9, 10)
    return fitting_stages(config, num_weights, room, holds_last)
