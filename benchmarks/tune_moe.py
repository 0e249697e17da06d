"""Times candidate configurations of the Triton MoE kernels and prints the best per batch size.

Run as ``python -m benchmarks.bench_expert_ffn --tune``. Every candidate is compared with what
float32 gives before it is timed, and the run ends if one is wrong. Compiling takes longer than
timing, so worker processes compile everything first, into Triton's cache on disk.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import moe_workload
from benchmarks.gpu_timing import errors_of_fit
from benchmarks.moe_workload import (
    Batch,
    Dims,
    Layer,
    check_routing,
    check_rows,
    make_batches,
    microseconds,
)
from moe_engine.ops import moe
from moe_engine.ops.reference import moe as reference

ROUTER_TOKENS = (128, 256, 512, 1024, 2048)
MAX_COMPILERS = 14


def tune(
    dims: Dims, layers: list[Layer], tokens: Sequence[int], zipf: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds by product or "router", batch size, and configuration."""
    jobs = [
        (product, config, dims)
        for num_tokens in tokens
        for product in ("gate_up", "down")
        for config in _candidates(dims, num_tokens)
    ]
    jobs = list(dict.fromkeys(jobs))
    num_compilers = min(MAX_COMPILERS, os.cpu_count() or 1, len(jobs))
    with multiprocessing.get_context("spawn").Pool(num_compilers) as pool:
        pool.map(_compile, jobs, chunksize=1)

    results: dict[str, dict[str, dict[str, float]]] = {"gate_up": {}, "down": {}}
    for num_tokens in tokens:
        batches = make_batches(dims, layers, num_tokens, 12 if num_tokens <= 16 else 6, zipf)
        for product, (run, expected) in _products(dims, batches).items():
            candidates = _candidates(dims, num_tokens)
            name = f"{product} at {num_tokens} tokens"
            times = time_candidates(name, run, expected, candidates, len(batches))
            best = sorted(times, key=times.__getitem__)
            for config in best[:4]:
                print(f"{num_tokens:5d} tokens {product:8s} {times[config]:8.1f} us {config}")
            results[product][str(num_tokens)] = {str(c): times[c] for c in best}
    results["router"] = tune_router(dims)
    return results


def time_candidates(
    name: str,
    run: Callable[[int, Any], torch.Tensor],
    expected: torch.Tensor,
    candidates: Sequence[Any],
    num_batches: int,
) -> dict[Any, float]:
    """Microseconds of every candidate that fits, each compared with ``expected`` first.

    Args:
        run: called with the index of a batch and a candidate.
        expected: float32, of batch 0.
    """
    times = {}
    for config in candidates:
        try:
            out = run(0, config)
        except errors_of_fit() as error:
            print(f"{name}, {config}: {type(error).__name__}")
            continue
        check_rows(f"{name}, {config},", out, expected)
        times[config] = microseconds([partial(run, i, config) for i in range(num_batches)])
    return times


def tune_router(dims: Dims) -> dict[str, dict[str, float]]:
    """Microseconds of the router's two kernels around the number of tokens where they change."""
    from moe_engine.kernels import router

    gates = torch.empty(
        256, dims.num_experts, dims.hidden, device=moe_workload.DEVICE, dtype=torch.bfloat16
    ).normal_(std=dims.hidden**-0.5)
    results: dict[str, dict[str, float]] = {}
    usual = router.SPLIT_MAX_TOKENS
    try:
        for num_tokens in ROUTER_TOKENS:
            x_TH = torch.randn(num_tokens, dims.hidden, device=gates.device, dtype=torch.bfloat16)
            logits_TE = x_TH.float() @ gates[0].float().t()
            results[str(num_tokens)] = {}
            for name, limit in (("split", num_tokens), ("whole", 0)):
                router.SPLIT_MAX_TOKENS = limit
                chosen = router.route(x_TH, gates[0], dims.top_k, True, None)
                check_routing(f"the {name} router", logits_TE, *chosen)
                calls = [
                    partial(router.route, x_TH, gates[i], dims.top_k, True, None)
                    for i in range(128)
                ]
                results[str(num_tokens)][name] = microseconds(calls)
            print(f"router {num_tokens} tokens: {results[str(num_tokens)]}")
    finally:
        router.SPLIT_MAX_TOKENS = usual
    return results


def _candidates(dims: Dims, num_tokens: int) -> list[Any]:
    """Configurations worth trying at a batch size."""
    from moe_engine.kernels.expert_ffn import GemmConfig

    num_pairs = num_tokens * dims.top_k
    mean_pairs = num_pairs / min(num_pairs, dims.num_experts)
    if mean_pairs <= 40:
        # Streaming the weights: enough of them under way, in programs that share a multiprocessor.
        rows = [16] if mean_pairs <= 4 else [16, 32] if mean_pairs <= 12 else [32, 64]
        return [
            GemmConfig(block_m, block_n, block_k, 4, stages, swap)
            for block_m, (block_n, block_k, stages), swap in itertools.product(
                rows,
                [
                    (32, 128, 4),
                    (32, 256, 3),
                    (64, 64, 4),
                    (64, 128, 2),
                    (64, 128, 3),
                    (64, 128, 4),
                    (64, 256, 3),
                    (128, 64, 4),
                    (128, 128, 3),
                ],
                [False, True],
            )
            if not swap or block_n >= 64
        ]
    return [
        GemmConfig(block_m, block_n, 64, warps, stages)
        for block_m, block_n, warps, stages in [
            (64, 64, 4, 4),
            (64, 128, 4, 3),
            (64, 128, 4, 4),
            (64, 256, 8, 3),
            (128, 64, 4, 4),
            (128, 64, 8, 4),
            (128, 128, 8, 3),
            (128, 128, 8, 4),
            (128, 256, 8, 3),
            (128, 256, 8, 4),
            (256, 128, 8, 3),
        ]
    ]


def _products(
    dims: Dims, batches: Sequence[Batch]
) -> dict[str, tuple[Callable[[int, Any], torch.Tensor], torch.Tensor]]:
    """Each product as a function of the batch's index and a configuration; batch 0's reference."""
    from moe_engine.kernels import expert_ffn as kernels

    groups = [moe.group_by_expert(batch.ids_TK, dims.num_experts) for batch in batches]
    num_pairs = batches[0].ids_TK.numel()
    h_PI = torch.randn(
        num_pairs, dims.intermediate, device=moe_workload.DEVICE, dtype=torch.bfloat16
    )

    def gate_up(i: int, config: kernels.GemmConfig) -> torch.Tensor:
        batch, group = batches[i], groups[i]
        weight_EJH = batch.layer.gate_up_EJH
        return kernels.gate_up(
            batch.x_TH, weight_EJH, group.offsets_E1, group.pairs_P, dims.top_k, config
        )

    def down(i: int, config: kernels.GemmConfig) -> torch.Tensor:
        batch, group = batches[i], groups[i]
        return kernels.down(h_PI, batch.layer.down_EHI, group.offsets_E1, group.pairs_P, config)

    expected_h_PI, expected_y_PH = reference_products(batches[0], h_PI)
    return {"gate_up": (gate_up, expected_h_PI), "down": (down, expected_y_PH)}


def reference_products(batch: Batch, h_PI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both products in float32: h [P, I] in the order of the experts, y [P, H] by pair.

    Args:
        h_PI: input of the second product, in the order of the experts.
    """
    layer, top_k = batch.layer, batch.ids_TK.shape[1]
    num_experts, hidden, _ = layer.down_EHI.shape
    offsets_E1, pairs_P = reference.group_by_expert(batch.ids_TK, num_experts)
    expected_h_PI = torch.empty_like(h_PI, dtype=torch.float32)
    expected_y_PH = h_PI.new_empty(len(h_PI), hidden, dtype=torch.float32)
    for expert, (first, last) in enumerate(itertools.pairwise(offsets_E1.tolist())):
        pairs = pairs_P[first:last].long()
        x_RH = batch.x_TH[pairs // top_k].float()
        gate, up = F.linear(x_RH, layer.gate_up_EJH[expert].float()).chunk(2, dim=-1)
        expected_h_PI[first:last] = F.silu(gate) * up
        expected_y_PH[pairs] = F.linear(h_PI[first:last].float(), layer.down_EHI[expert].float())
    return expected_h_PI, expected_y_PH


def _compile(job: tuple[str, Any, Dims]) -> None:
    """Compile one kernel into the cache on disk, in a worker process; what fails fails later."""
    from moe_engine.kernels import expert_ffn as kernels

    product, config, dims = job
    device = torch.device("cuda", torch.cuda.current_device())
    x, i32 = torch.bfloat16, torch.int32
    sizes = {"HIDDEN": dims.hidden, "INTERMEDIATE": dims.intermediate}
    num_weights = 2 if product == "gate_up" else 1
    options = kernels._options(dims.num_experts, config, num_weights, device)
    try:
        if product == "gate_up":
            kernels._gate_up_kernel.warmup(
                *(x, x, i32, i32, x, dims.num_experts, dims.hidden),
                TOP_K=dims.top_k,
                grid=(1,),
                **sizes,
                **options,
            )
        else:
            kernels._down_kernel.warmup(
                *(x, x, i32, i32, x, dims.num_experts), grid=(1,), **sizes, **options
            )
    except Exception as error:
        print(f"{product} {config} does not compile: {error}")
