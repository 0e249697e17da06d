"""The kernels around the experts and attention: router, grouping, sums, norms, linear layers.

Each is compared with float32 first, and the benchmark ends if one is wrong. The bytes that a kernel
must read and write, over its time, are set against the rate of reading. Rows and outputs of a few
tokens stay in the L2 cache, as they do in the model, so such a share may exceed 1; the matrices
change from call to call and come from memory.

Shape legend: T tokens, R rows, H hidden size, E experts, K experts per token, P = T × K pairs,
X input width, O output width, S parts of the depth X.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import moe_workload
from benchmarks.gpu_timing import ROTATED_BYTES
from benchmarks.moe_workload import Batch, Dims, Layer, check_routing, check_rows, microseconds
from moe_engine.ops import hopper, moe
from moe_engine.ops.reference import moe as reference
from moe_engine.ops.reference import norm as norm_reference

EPS = 1e-6
# Hidden size -> (input, output) of the fused projection and of the output projection: those of
# Qwen3-30B-A3B and of Qwen3-235B-A22B.
LINEAR_LAYERS = {2048: ((2048, 5120), (4096, 2048)), 4096: ((4096, 9216), (8192, 4096))}
LINEAR_ROWS = (1, 4, 8, 16)
SPLIT_LINEAR_ROWS = (17, 32, 64)
ROUTER_ROWS = (1, 4, 8, 16)

Timed = dict[str, float]


def against_reading(us: float, num_bytes: float, reading: float) -> Timed:
    """A time, the rate at which it moved its bytes, and that over the rate of reading.

    Args:
        us: microseconds.
        reading: the machine's bytes/s.
    """
    rate = num_bytes / us * 1e6
    return {"us": us, "tb_per_s": rate / 1e12, "share_of_reading": rate / reading}


def describe(timed: Timed) -> str:
    """For people, e.g. ``5.20 us (62%)``."""
    return f"{timed['us']:.2f} us ({timed['share_of_reading']:.0%})"


def bench_small(dims: Dims, num_tokens: int, zipf: bool, reading: float) -> dict[str, Any]:
    """Times of router, grouping and sums, at one batch size."""
    num_calls = 256 if num_tokens <= 512 else 16
    gates = make_matrices(dims.num_experts, dims.hidden)
    batch = Batch.random(dims, Layer(gates[0], gates[0]), num_tokens, zipf)
    x_TH, ids_TK = batch.x_TH, batch.ids_TK
    y_PH = torch.randn(ids_TK.numel(), dims.hidden, device=x_TH.device, dtype=torch.bfloat16)
    weight_H = torch.rand(dims.hidden, device=x_TH.device).bfloat16()
    num_tokens_1 = torch.tensor([num_tokens], dtype=torch.int32, device=x_TH.device)
    outputs = moe.ExpertOutputs(y_PH, ids_TK, batch.weights_TK)
    check_small(dims, gates[0], batch, outputs, weight_H)

    def route(i: int) -> object:
        return moe.route(x_TH, gates[i % len(gates)], dims.top_k, True, num_tokens_1)

    chosen = ids_TK.nbytes + batch.weights_TK.nbytes
    kernels: dict[str, tuple[Callable[[int], object], int]] = {
        "route": (route, x_TH.nbytes + gates[0].nbytes + chosen),
        "group_by_expert": (
            lambda _: moe.group_by_expert(ids_TK, dims.num_experts),
            2 * ids_TK.nbytes + 4 * (dims.num_experts + 1),
        ),
        "sum_choices": (
            lambda _: moe.sum_choices(y_PH, ids_TK, batch.weights_TK),
            y_PH.nbytes + chosen + x_TH.nbytes,
        ),
        "sum_add_rms_norm": (
            lambda _: moe.sum_add_rms_norm(outputs, x_TH, weight_H, EPS),
            y_PH.nbytes + chosen + weight_H.nbytes + 3 * x_TH.nbytes,
        ),
    }
    row: dict[str, Any] = {"tokens": num_tokens}
    for name, (call, num_bytes) in kernels.items():
        us = microseconds([partial(call, i) for i in range(num_calls)])
        row[name] = against_reading(us, num_bytes, reading)
    times = ", ".join(f"{name} {describe(row[name])}" for name in kernels)
    print(f"{num_tokens} tokens: {times}", flush=True)
    return row


def check_small(
    dims: Dims,
    gate_EH: torch.Tensor,
    batch: Batch,
    outputs: moe.ExpertOutputs,
    weight_H: torch.Tensor,
) -> None:
    """`SystemExit` if one of the kernels of `bench_small` is wrong."""
    x_TH, ids_TK = batch.x_TH, batch.ids_TK
    at = f"at {len(x_TH)} tokens"
    logits_TE = x_TH.float() @ gate_EH.float().t()
    check_routing("route", logits_TE, *moe.route(x_TH, gate_EH, dims.top_k, True))

    groups = moe.group_by_expert(ids_TK, dims.num_experts)
    offsets_E1, pairs_P = reference.group_by_expert(ids_TK, dims.num_experts)
    if not (torch.equal(groups.offsets_E1, offsets_E1) and torch.equal(groups.pairs_P, pairs_P)):
        raise SystemExit(f"group_by_expert {at} is wrong; nothing was timed")

    summed_TH = reference.sum_choices(outputs.y_PH.float(), ids_TK, batch.weights_TK)
    check_rows(f"sum_choices {at}", moe.summed(outputs), summed_TH)
    expected = norm_reference.add_rms_norm(summed_TH, x_TH.float(), weight_H.float(), EPS)
    found = moe.sum_add_rms_norm(outputs, x_TH, weight_H, EPS)
    for name, ours_TH, expected_TH in zip(("norm", "residual"), found, expected, strict=True):
        check_rows(f"sum_add_rms_norm's {name} {at}", ours_TH, expected_TH)


def bench_linear(reading: float) -> list[dict[str, Any]]:
    """Times of the linear layers of few rows, by kernel and shape, where a kernel is used."""
    kernels = (
        ("streaming_linear", LINEAR_ROWS, hopper.takes_linear, hopper.linear),
        ("split_linear", SPLIT_LINEAR_ROWS, hopper.takes_split_linear, hopper.split_linear),
    )
    timed = []
    for hidden, layers in LINEAR_LAYERS.items():
        for num_in, num_out in layers:
            weights = make_matrices(num_out, num_in)
            for name, num_rows, takes, call in (
                (name, num_rows, takes, call)
                for name, rows, takes, call in kernels
                for num_rows in rows
            ):
                x_RX, shape = _random(num_rows, num_in), f"{num_rows} x {num_in} to {num_out}"
                if not takes(x_RX, weights[0]):
                    print(f"{name} is not used for {shape}")
                    continue
                out = call(x_RX, weights[0])
                out_RO = out.sum(0) if out.dim() == 3 else out  # parts of it
                check_rows(f"{name}, {shape},", out_RO, x_RX.float() @ weights[0].float().t())
                num_bytes = x_RX.nbytes + weights[0].nbytes + out.nbytes
                case = {"hidden": hidden, "rows": num_rows, "in": num_in, "out": num_out}
                calls = [partial(call, x_RX, weight_OX) for weight_OX in weights]
                timed.append(_time(name, case, calls, num_bytes, reading))
    return timed


def bench_norm_router(num_experts: int, top_k: int, reading: float) -> list[dict[str, Any]]:
    """Times of the kernel of norm and router, at both hidden sizes, where it is used."""
    timed = []
    for hidden in LINEAR_LAYERS:
        gates = make_matrices(num_experts, hidden)
        weight_H = torch.rand(hidden, device=gates.device).bfloat16()
        for num_rows in ROUTER_ROWS:
            x_RH, residual_RH = _random(num_rows, hidden), _random(num_rows, hidden)
            if not hopper.takes_norm_router(x_RH, residual_RH, weight_H, gates[0], top_k):
                print(f"norm_router is not used for {num_rows} x {hidden}, {num_experts} experts")
                continue
            call = partial(_norm_router, x_RH, residual_RH, weight_H, top_k)
            found = call(gates[0])
            check_norm_router(x_RH, residual_RH, weight_H, gates[0], found)
            read = x_RH.nbytes + residual_RH.nbytes + weight_H.nbytes + gates[0].nbytes
            num_bytes = read + sum(tensor.nbytes for tensor in found)
            calls = [partial(call, gate_EH) for gate_EH in gates]
            case = {"hidden": hidden, "rows": num_rows, "experts": num_experts}
            timed.append(_time("norm_router", case, calls, num_bytes, reading))
    return timed


def check_norm_router(
    x_RH: torch.Tensor,
    residual_RH: torch.Tensor,
    weight_H: torch.Tensor,
    gate_EH: torch.Tensor,
    found: tuple[torch.Tensor, ...],
) -> None:
    """`SystemExit` if ``found``, what `hopper.norm_router` returned, is wrong."""
    normed_RH, new_residual_RH, ids_RK, weights_RK = found
    at = f"at {len(x_RH)} rows of {x_RH.shape[1]}"
    expected_normed_RH, expected_RH = norm_reference.add_rms_norm(
        x_RH.float(), residual_RH.float(), weight_H.float(), EPS
    )
    check_rows(f"norm_router's norm {at}", normed_RH, expected_normed_RH)
    check_rows(f"norm_router's residual {at}", new_residual_RH, expected_RH)
    # As the kernel does it: the sum is rounded, its norm is not.
    unrounded_RH = norm_reference.rms_norm((x_RH + residual_RH).float(), weight_H.float(), EPS)
    check_routing("norm_router", unrounded_RH @ gate_EH.float().t(), ids_RK, weights_RK)


def make_matrices(num_rows: int, num_columns: int) -> torch.Tensor:
    """As many bfloat16 matrices as leave the L2 cache behind; products keep the inputs' size."""
    shape = (-(-ROTATED_BYTES // (2 * num_rows * num_columns)), num_rows, num_columns)
    matrices = torch.empty(shape, device=moe_workload.DEVICE, dtype=torch.bfloat16)
    return matrices.normal_(std=num_columns**-0.5)


def _norm_router(
    x_RH: torch.Tensor,
    residual_RH: torch.Tensor,
    weight_H: torch.Tensor,
    top_k: int,
    gate_EH: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    return hopper.norm_router(x_RH, residual_RH, weight_H, EPS, gate_EH, top_k, True, None)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=moe_workload.DEVICE, dtype=torch.bfloat16)


def _time(
    name: str,
    case: dict[str, int],
    calls: Sequence[Callable[[], object]],
    num_bytes: int,
    reading: float,
) -> dict[str, Any]:
    timed = against_reading(microseconds(calls), num_bytes, reading)
    print(f"{name} {case}: {describe(timed)}", flush=True)
    return {"kernel": name, **case, **timed}
