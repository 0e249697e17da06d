"""The MoE layer's pieces on one GPU: experts by every implementation, and the small kernels.

    python -m benchmarks.bench_expert_ffn [--json FILE] [--tokens 1,8,64] [--skew zipf] [--tune]

Every implementation in `ops.moe.EXPERT_FFNS` that a CUDA graph can hold is compared with the
float32 reference first, and the benchmark ends if one is wrong. A time is a graph's of many calls
that go round several layers' weights, so weights come from memory, divided by their number. The
weight bytes of the experts hit, over the time, are set against the rate of reading, and the
operations against a large matrix product's, both of the same run (`benchmarks.ceilings`). The
small kernels (`small_kernels`) are set against the rate of reading by the bytes they move.

``--tune`` instead times the configurations of `benchmarks.tune_moe` and prints the best ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings
from benchmarks.gpu_state import require_gpu
from benchmarks.machine import describe_machine
from benchmarks.moe_workload import Batch, Dims, Layer, make_batches, microseconds
from benchmarks.options import int_list
from benchmarks.report import save_result
from benchmarks.small_kernels import (
    VOCAB_SIZE,
    against_reading,
    bench_embedding,
    bench_linear,
    bench_linear_onto,
    bench_norm_and_route,
    bench_norm_router,
    bench_small,
    describe,
)
from benchmarks.tune_moe import tune
from moe_engine.ops import hopper, moe
from moe_engine.ops.reference import sampling as sampling_reference
from moe_engine.ops.sampling import greedy_tokens

NUM_LAYERS = 3
# An implementation this many times slower than the floor is not timed at larger batches.
HOPELESS = 6.0
GREEDY_ROWS = (1, 8, 64, 256)


def main() -> None:
    """Parse the options, measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument(
        "--tokens", type=int_list, default=int_list("1,2,4,8,16,32,64,128,256,512,1024,4096,8192")
    )
    parser.add_argument("--skew", choices=["even", "zipf"], default="even")
    parser.add_argument("--tune", action="store_true", help="time candidate configurations")
    options = parser.parse_args()
    require_gpu()

    torch.manual_seed(0)
    dims = Dims(options.hidden, options.intermediate, options.experts, options.top_k)
    layers = [Layer.random(dims) for _ in range(NUM_LAYERS)]
    zipf = options.skew == "zipf"
    results: dict[str, Any] = {
        "machine": describe_machine() | {"gpu": torch.cuda.get_device_name()},
        "ceilings": ceilings.run("cuda"),
        "dims": vars(dims),
        "skew": options.skew,
    }
    print(json.dumps({key: results[key] for key in ("machine", "ceilings")}))
    if options.tune:
        results["tuning"] = tune(dims, layers, options.tokens, zipf)
    else:
        names = graphable_implementations(dims, layers[0])
        results["experts"] = []
        for num_tokens in sorted(options.tokens):
            if "streaming" in names and not hopper.takes_streaming_experts(
                dims.top_k, layers[0].down_EHI, num_tokens
            ):
                names.remove("streaming")
            row = bench_experts(dims, layers, num_tokens, zipf, results["ceilings"], names)
            results["experts"].append(row)
            names = [name for name in names if row["share_of_floor"][name] > 1 / HOPELESS]
        reading = ceilings.rate(results["ceilings"], "read")
        results["small"] = [
            bench_small(dims, num_tokens, zipf, reading) for num_tokens in options.tokens
        ]
        results["linear"] = bench_linear(reading)
        results["norm_router"] = bench_norm_router(dims.num_experts, dims.top_k, reading)
        results["norm_and_route"] = bench_norm_and_route(dims.num_experts, dims.top_k, reading)
        multiplying = ceilings.rate(results["ceilings"], "matmul")
        results["linear_onto"] = bench_linear_onto(reading, multiplying)
        results["embedding"] = bench_embedding(reading)
        results["greedy"] = [bench_greedy(num_rows, reading) for num_rows in GREEDY_ROWS]
    if options.json:
        save_result(options.json, results)


def graphable_implementations(dims: Dims, layer: Layer) -> list[str]:
    """Those that run here, without the reference, which waits for the device."""
    batch = Batch.random(dims, layer, 1, zipf=False)
    if not hopper.takes_experts(batch.x_TH, layer.gate_up_EJH, layer.down_EHI):
        return ["triton"]
    return [name for name in moe.EXPERT_FFNS if name != "reference"]


def bench_experts(
    dims: Dims,
    layers: list[Layer],
    num_tokens: int,
    zipf: bool,
    machine_ceilings: dict[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """Microseconds of the implementations ``names`` and of Triton's parts, at one batch size."""
    batches = make_batches(dims, layers, num_tokens, 24 if num_tokens <= 16 else 6, zipf)
    num_hit = sum(batch.num_experts_hit() for batch in batches) / len(batches)
    row: dict[str, Any] = {"tokens": num_tokens, "experts_hit": num_hit, "us": {}}
    for name in names:
        expert_ffn = moe.EXPERT_FFNS[name]
        batches[0].check(name, moe.summed(expert_ffn(*batches[0].arguments)))
        calls = [partial(expert_ffn, *batch.arguments) for batch in batches]
        row["us"][name] = microseconds(calls)
    row["us"].update(_triton_parts(dims, batches))
    row["us"].update(_torch_grouped_mm(dims, batches))

    weight_bytes = num_hit * dims.expert_bytes
    operations = num_tokens * dims.top_k * 6 * dims.hidden * dims.intermediate
    row["floor_us"] = max(
        weight_bytes / ceilings.rate(machine_ceilings, "read") * 1e6,
        operations / ceilings.rate(machine_ceilings, "matmul") * 1e6,
    )
    row["tb_per_s"] = {name: weight_bytes / row["us"][name] / 1e6 for name in names}
    row["tflops"] = {name: operations / row["us"][name] / 1e6 for name in names}
    row["share_of_floor"] = {name: row["floor_us"] / row["us"][name] for name in names}
    print(
        f"{num_tokens:5d} tokens, {num_hit:5.1f} experts, floor {row['floor_us']:7.1f} us:",
        ", ".join(f"{name} {us:.1f}" for name, us in row["us"].items()),
        "|",
        ", ".join(
            f"{name} {row['tb_per_s'][name]:.2f} TB/s {row['tflops'][name]:.0f} TFLOP/s "
            f"{row['share_of_floor'][name]:.0%}"
            for name in names
        ),
        flush=True,
    )
    return row


def _triton_parts(dims: Dims, batches: Sequence[Batch]) -> dict[str, float]:
    from moe_engine.kernels import expert_ffn as kernels

    num_pairs = batches[0].ids_TK.numel()
    config = kernels.config_for(num_pairs, dims.num_experts, torch.bfloat16)
    groups = [moe.group_by_expert(batch.ids_TK, dims.num_experts) for batch in batches]

    def gate_up(i: int) -> torch.Tensor:
        batch, group = batches[i], groups[i]
        return kernels.gate_up(
            batch.x_TH,
            batch.layer.gate_up_EJH,
            group.offsets_E1,
            group.pairs_P,
            dims.top_k,
            config.gate_up,
        )

    h_PI = gate_up(0)

    def down(i: int) -> torch.Tensor:
        batch, group = batches[i], groups[i]
        return kernels.down(
            h_PI,
            batch.layer.down_EHI,
            group.offsets_E1,
            group.pairs_P,
            config.down,
        )

    return {
        "triton gate_up": microseconds([partial(gate_up, i) for i in range(len(batches))]),
        "triton down": microseconds([partial(down, i) for i in range(len(batches))]),
    }


def _torch_grouped_mm(dims: Dims, batches: Sequence[Batch]) -> dict[str, float]:
    """PyTorch's two grouped products alone, on rows that are gathered beforehand."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    ends_E = [
        moe.group_by_expert(batch.ids_TK, dims.num_experts).offsets_E1[1:].clone()
        for batch in batches
    ]
    x_PH = batches[0].x_TH.repeat_interleave(dims.top_k, dim=0)
    h_PI = torch.randn(len(x_PH), dims.intermediate, device="cuda", dtype=torch.bfloat16)

    def product(a: torch.Tensor, weights: list[torch.Tensor], i: int) -> torch.Tensor:
        out: torch.Tensor = grouped_mm(a, weights[i].transpose(1, 2), offs=ends_E[i])
        return out

    gate_up = [batch.layer.gate_up_EJH for batch in batches]
    down = [batch.layer.down_EHI for batch in batches]
    calls = range(len(batches))
    try:
        return {
            "torch gate_up": microseconds([partial(product, x_PH, gate_up, i) for i in calls]),
            "torch down": microseconds([partial(product, h_PI, down, i) for i in calls]),
        }
    except RuntimeError as error:
        print(f"torch's grouped_mm does not run: {error}")
        return {}


def bench_greedy(num_rows: int, reading: float) -> dict[str, Any]:
    """Microseconds of the greedy choice; few rows' logits are in L2, where lm_head leaves them.

    Args:
        reading: the machine's bytes/s.
    """
    logits_BV = torch.randn(num_rows, VOCAB_SIZE, device="cuda", dtype=torch.bfloat16)
    expected_B = sampling_reference.greedy_tokens(logits_BV.cpu())
    if not torch.equal(greedy_tokens(logits_BV).cpu(), expected_B):
        raise SystemExit(f"the greedy choice is wrong at {num_rows} rows")
    us = microseconds([lambda: greedy_tokens(logits_BV)] * 16)
    timed = against_reading(us, logits_BV.nbytes, reading)
    print(f"greedy, {num_rows} rows: {describe(timed)}", flush=True)
    return {"rows": num_rows, **timed}


if __name__ == "__main__":
    main()
