"""What the operators of a prompt's layer take while the card is at its power limit.

    python -m benchmarks.bench_energy --json benchmarks/results/energy_h200.json

A prompt of thousands of tokens keeps a card at the limit of its power, which then lowers its clock:
a step takes as long as its energy allows, and what an operator takes alone and rested says little.
So each runs here again and again for seconds, and the driver's meter tells what a call costs.
Layers are Qwen3-30B-A3B's on one GPU. Every result is compared with float32 first.

Shape legend: T tokens, H hidden size, E experts, K experts per token, G KV heads, D head dimension,
X input width, O output width.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention_cases as cases
from benchmarks.gpu_state import require_gpu
from benchmarks.moe_workload import CHECKED_ROWS, DEVICE, Batch, Dims, Layer, check_rows
from benchmarks.report import save_result
from benchmarks.small_kernels import EPS, check_norm_router, make_matrices
from moe_engine.ops import cudnn_prefill, moe
from moe_engine.ops.attention import attend, paged_attention
from moe_engine.ops.linear import AddedOutput, adds_in_place, linear, linear_onto
from moe_engine.ops.reference import norm as norm_reference

DIMS = Dims(hidden=2048, intermediate=768, num_experts=128, top_k=8)
CALLS_AT_ONCE = 10


@dataclass(frozen=True)
class Work:
    """An operator on its data.

    Attributes:
        flop: of its matrix products.
    """

    name: str
    run: Callable[[], object]
    flop: float = 0.0


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt")
    parser.add_argument("--seconds", type=float, default=2.0, help="that each is measured for")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    require_gpu()
    meter = Meter()
    works = [*attention_works(arguments.tokens), *moe_works(arguments.tokens)]
    rows = [measure(work, meter, arguments.seconds) for work in works]
    if arguments.json:
        result = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "power_limit_w": meter.limit_w(),
            "tokens": arguments.tokens,
            "operators": rows,
        }
        save_result(arguments.json, result)


class Meter:
    """The first GPU's, through NVML (package nvidia-ml-py)."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        self._gpu = pynvml.nvmlDeviceGetHandleByIndex(0)

    def joules(self) -> float:
        """Used so far. It moves on about ten times a second."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1e3

    def clock_mhz(self) -> int:
        """Of the multiprocessors, now."""
        return int(self._nvml.nvmlDeviceGetClockInfo(self._gpu, self._nvml.NVML_CLOCK_SM))

    def limit_w(self) -> float:
        """The power that the card may take."""
        return float(self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._gpu)) / 1e3


def measure(work: Work, meter: Meter, seconds: float) -> dict[str, Any]:
    """Time and energy of a call, after as long a warm-up."""
    keep_running(work.run, seconds)
    before, start = meter.joules(), time.perf_counter()
    num_calls = keep_running(work.run, seconds)
    elapsed, joules = time.perf_counter() - start, meter.joules() - before
    row = {
        "operator": work.name,
        "us": elapsed / num_calls * 1e6,
        "mj": joules / num_calls * 1e3,
        "watts": joules / elapsed,
        "clock_mhz": meter.clock_mhz(),
    }
    if work.flop:
        row["tflop_per_s"] = work.flop * num_calls / elapsed / 1e12
        row["mj_per_gflop"] = joules / num_calls * 1e3 / (work.flop / 1e9)
    print(", ".join(f"{k} {v:.4g}" if k != "operator" else str(v) for k, v in row.items()))
    return row


def keep_running(run: Callable[[], object], seconds: float) -> int:
    """Call it for so long; returns how often."""
    num_calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(CALLS_AT_ONCE):
            run()
        torch.cuda.synchronize()
        num_calls += CALLS_AT_ONCE
    return num_calls


def attention_works(num_tokens: int) -> list[Work]:
    """The fused projection, all from it on to the output projection, and that.

    Attention also alone, by the operator and by cuDNN.
    """
    width, hidden = cases.projection_width(), DIMS.hidden
    attended = cases.NUM_HEADS * cases.HEAD_DIM
    x_TH = torch.randn(num_tokens, hidden, device=DEVICE, dtype=torch.bfloat16)
    qkv_OX, out_OX = make_matrices(width, hidden)[0], make_matrices(hidden, attended)[0]
    _check_linear("qkv projection", x_TH, qkv_OX, linear(x_TH, qkv_OX))

    attended_TX = torch.randn(num_tokens, attended, device=DEVICE, dtype=torch.bfloat16)
    stream_TH = torch.zeros(num_tokens, hidden, device=DEVICE, dtype=torch.bfloat16)
    if not adds_in_place(attended_TX):
        raise SystemExit(f"--tokens is {num_tokens}: too few for the kernels of many rows")
    linear_onto(attended_TX, out_OX, stream_TH)
    _check_linear("output projection", attended_TX, out_OX, stream_TH)

    cache = cases.make_cache()
    inputs = cases.make_inputs([(num_tokens, num_tokens)])
    (new,) = cases.make_projections([inputs])
    whole = partial(
        attend, new.qkv_TX, new.norms, new.rope, new.positions_T, cache, inputs.batch, cases.SCALE
    )
    cases.check_attend("prefill", inputs, new, cache, whole)
    own_kv_2TGD = inputs.own_kv(cache)
    alone = partial(paged_attention, inputs.q_TND, cache, inputs.batch, cases.SCALE, own_kv_2TGD)
    keys_TGD, values_TGD = own_kv_2TGD
    by_cudnn = partial(
        cudnn_prefill.attend, inputs.q_TND, keys_TGD, values_TGD, 1, num_tokens, cases.SCALE
    )
    for name, run in (("attention", alone), ("attention by cuDNN", by_cudnn)):
        cases.check(name, cases.worst_difference(inputs, cache, run()))
    attention_flop = 2.0 * attended * num_tokens * (num_tokens + 1)
    return [
        Work("qkv projection", partial(linear, x_TH, qkv_OX), 2.0 * num_tokens * qkv_OX.numel()),
        Work("from the projection on", whole, attention_flop),
        Work("attention", alone, attention_flop),
        Work("attention by cuDNN", by_cudnn, attention_flop),
        Work(
            "output projection",
            partial(linear_onto, attended_TX, out_OX, stream_TH),
            2.0 * num_tokens * out_OX.numel(),
        ),
    ]


def moe_works(num_tokens: int) -> list[Work]:
    """Norm and router, the experts, the sum of what they made with the next norm."""
    batch = Batch.random(DIMS, Layer.random(DIMS), num_tokens, zipf=False)
    x_TH, ids_TK, weights_TK = batch.x_TH, batch.ids_TK, batch.weights_TK
    router_EH = make_matrices(DIMS.num_experts, DIMS.hidden)[0]
    weight_H = torch.rand(DIMS.hidden, device=DEVICE).bfloat16()
    route = partial(
        moe.norm_and_route, AddedOutput(x_TH), x_TH, weight_H, EPS, router_EH, DIMS.top_k, True
    )
    nothing_TH = torch.zeros_like(x_TH)
    check_norm_router(nothing_TH, x_TH, weight_H, router_EH, route(), "norm and router")

    experts = partial(moe.expert_ffn, *batch.arguments)
    outputs = experts()
    batch.check("experts", moe.summed(outputs))
    if not isinstance(outputs, moe.ExpertOutputs):
        raise SystemExit(f"--tokens is {num_tokens}: too few for the kernels of many rows")
    add = partial(moe.sum_add_rms_norm, outputs, x_TH, weight_H, EPS)
    summed_TH = moe.sum_choices(outputs.y_PH, ids_TK, weights_TK).float()
    expected_TH = norm_reference.add_rms_norm(summed_TH, x_TH.float(), weight_H.float(), EPS)[0]
    check_rows("sum and norm", add()[0], expected_TH)
    flop = 6.0 * ids_TK.numel() * DIMS.hidden * DIMS.intermediate
    return [
        Work("norm and router", route),
        Work("experts", experts, flop),
        Work("sum of experts, norm", add),
    ]


def _check_linear(
    name: str, x_TX: torch.Tensor, weight_OX: torch.Tensor, out_TO: torch.Tensor
) -> None:
    """`SystemExit` if some rows are not what float32 gives."""
    rows = torch.randperm(len(x_TX), device=DEVICE)[:CHECKED_ROWS]
    check_rows(name, out_TO[rows], x_TX[rows].float() @ weight_OX.float().t())


if __name__ == "__main__":
    main()
