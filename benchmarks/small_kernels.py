"""The kernels around experts and attention: router, grouping, sums, norms, linears, embedding.

Each is compared with float32 first, and the benchmark ends if one is wrong. The bytes that a kernel
must read and write, over its time, are set against the rate of reading. Rows and outputs of a few
tokens stay in the L2 cache, as they do in the model, so such a share may exceed 1; the matrices
change from call to call and come from memory, and so do the rows of many tokens.

Shape legend: T tokens, R rows, H hidden size, E experts, K experts per token, P = T × K pairs,
X input width, O output width, S parts of the depth X, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import moe_workload
from benchmarks.gpu_timing import ROTATED_BYTES, num_rotations
from benchmarks.moe_workload import Batch, Dims, Layer, check_routing, check_rows, microseconds
from moe_engine.ops import hopper, linear, moe
from moe_engine.ops.embedding import embedding
from moe_engine.ops.linear import AddedOutput
from moe_engine.ops.reference import moe as reference
from moe_engine.ops.reference import norm as norm_reference

VOCAB_SIZE = 151_936
"""Qwen3's."""
EPS = 1e-6
# Hidden size -> (input, output) of the fused projection and of the output projection: those of
# Qwen3-30B-A3B and of Qwen3-235B-A22B.
LINEAR_LAYERS = {2048: ((2048, 5120), (4096, 2048)), 4096: ((4096, 9216), (8192, 4096))}
LINEAR_ROWS = (1, 4, 8, 16)
SPLIT_LINEAR_ROWS = (17, 32, 64)
ROUTER_ROWS = (1, 4, 8, 16, 32, 64)
NORM_AND_ROUTE_ROWS = (1024, 8192)
LINEAR_ONTO_ROWS = (8192,)
EMBEDDING_ROWS = (1, 64, 1024, 8192)

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


def bench_norm_and_route(num_experts: int, top_k: int, reading: float) -> list[dict[str, Any]]:
    """Times of norm and router of many rows, at both hidden sizes.

    Without an addition, as after `ops.linear.linear_onto`, and with one.
    """
    timed = []
    for hidden in LINEAR_LAYERS:
        gates = make_matrices(num_experts, hidden)
        weight_H = torch.rand(hidden, device=gates.device).bfloat16()
        for num_rows in NORM_AND_ROUTE_ROWS:
            num_streams = num_rotations(2 * num_rows * hidden)
            streams = [_random(num_rows, hidden) for _ in range(num_streams)]
            steps = [
                (stream_RH, gates[i % len(gates)], _random(num_rows, hidden))
                for i, stream_RH in enumerate(streams)
            ]
            for name, adds in (("norm_and_route", False), ("add_norm_and_route", True)):
                call = partial(_norm_and_route, weight_H, top_k, adds)
                stream_RH, gate_EH, x_RH = steps[0]
                found = call(*steps[0])
                x_RH = x_RH if adds else torch.zeros_like(x_RH)
                check_norm_router(x_RH, stream_RH, weight_H, gate_EH, found, name)
                # x is read and the sum is written, or neither.
                normed_RH, _, ids_RK, weights_RK = found
                rows = (stream_RH, normed_RH, *((x_RH, stream_RH) if adds else ()))
                others = (weight_H, gate_EH, ids_RK, weights_RK)
                num_bytes = sum(tensor.nbytes for tensor in (*rows, *others))
                case = {"hidden": hidden, "rows": num_rows, "experts": num_experts}
                calls = [partial(call, *step) for step in steps]
                timed.append(_time(name, case, calls, num_bytes, reading))
    return timed


def bench_linear_onto(reading: float, multiplying: float) -> list[dict[str, Any]]:
    """Times of the output projection of many rows, which is added in place, at both hidden sizes.

    Args:
        reading: the machine's bytes/s.
        multiplying: its FLOP/s in a large matrix product, which bounds this one.
    """
    timed = []
    for hidden, (_, (num_in, num_out)) in LINEAR_LAYERS.items():
        weights = make_matrices(num_out, num_in)
        for num_rows in LINEAR_ONTO_ROWS:
            x_RX, residual_RO = _random(num_rows, num_in), _random(num_rows, num_out)
            shape = f"{num_rows} x {num_in} to {num_out}"
            if not linear.adds_in_place(x_RX):
                print(f"linear_onto does not add in place for {shape}")
                continue
            expected_RO = residual_RO.float() + x_RX.float() @ weights[0].float().t()
            out = linear.linear_onto(x_RX, weights[0], residual_RO)
            assert isinstance(out, AddedOutput), type(out)
            check_rows(f"linear_onto, {shape},", out.stream_TO, expected_RO)
            num_bytes = x_RX.nbytes + weights[0].nbytes + 2 * residual_RO.nbytes
            case = {"hidden": hidden, "rows": num_rows, "in": num_in, "out": num_out}
            calls = [partial(linear.linear_onto, x_RX, w_OX, residual_RO) for w_OX in weights]
            row = _time("linear_onto", case, calls, num_bytes, reading)
            rate = 2 * num_rows * num_in * num_out / row["us"] * 1e6
            row |= {"tflop_per_s": rate / 1e12, "share_of_multiplying": rate / multiplying}
            print(f"    {rate / 1e12:.0f} TFLOP/s ({rate / multiplying:.0%})", flush=True)
            timed.append(row)
    return timed


def bench_embedding(reading: float) -> list[dict[str, Any]]:
    """Times of the embedding, at both hidden sizes; each call has tokens of its own."""
    timed = []
    for hidden in LINEAR_LAYERS:
        weight_VH = _random(VOCAB_SIZE, hidden)
        for num_rows in EMBEDDING_ROWS:
            row_bytes = 2 * num_rows * hidden
            ids = [
                torch.randint(VOCAB_SIZE, (num_rows,), device=weight_VH.device)
                for _ in range(num_rotations(row_bytes))
            ]
            found_RH = embedding(ids[0], weight_VH, 0, VOCAB_SIZE)
            check_rows(f"embedding of {num_rows} tokens", found_RH, weight_VH[ids[0]].float())
            calls = [partial(embedding, ids_R, weight_VH, 0, VOCAB_SIZE) for ids_R in ids]
            case = {"hidden": hidden, "rows": num_rows}
            num_bytes = 2 * row_bytes + ids[0].nbytes
            timed.append(_time("embedding", case, calls, num_bytes, reading))
    return timed


def check_norm_router(
    x_RH: torch.Tensor,
    residual_RH: torch.Tensor,
    weight_H: torch.Tensor,
    gate_EH: torch.Tensor,
    found: tuple[torch.Tensor, ...],
    name: str = "norm_router",
) -> None:
    """`SystemExit` if ``found``, what ``name`` returned, is wrong."""
    normed_RH, new_residual_RH, ids_RK, weights_RK = found
    at = f"at {len(x_RH)} rows of {x_RH.shape[1]}"
    expected_normed_RH, expected_RH = norm_reference.add_rms_norm(
        x_RH.float(), residual_RH.float(), weight_H.float(), EPS
    )
    check_rows(f"{name}'s norm {at}", normed_RH, expected_normed_RH)
    check_rows(f"{name}'s residual {at}", new_residual_RH, expected_RH)
    # As the kernels do it: the sum is rounded, its norm is not.
    unrounded_RH = norm_reference.rms_norm((x_RH + residual_RH).float(), weight_H.float(), EPS)
    check_routing(name, unrounded_RH @ gate_EH.float().t(), ids_RK, weights_RK)


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


def _norm_and_route(
    weight_H: torch.Tensor,
    top_k: int,
    adds: bool,
    stream_RH: torch.Tensor,
    gate_EH: torch.Tensor,
    x_RH: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    x = x_RH if adds else AddedOutput(stream_RH)
    return moe.norm_and_route(x, stream_RH, weight_H, EPS, gate_EH, top_k, True)


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
