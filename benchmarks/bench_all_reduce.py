"""The all-reduce of few rows by our packets, against NCCL's and PyTorch's one-shot one.

    python -m benchmarks.bench_all_reduce --virtual --ranks 2 --rows 1,8,64 --json FILE
    torchrun --nproc-per-node 2 -m benchmarks.bench_all_reduce --rows 1,8,64 --json FILE

Ranks are virtual or real as in `bench_exchange`, and times are taken in the same way: the slowest
rank's, of one sum of a graph of several. The sum's bits are compared first. NCCL and PyTorch are
measured between real ranks alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.exchange_cases import EXCHANGES
from benchmarks.exchange_ranks import Rank, Ranks, RealRanks, VirtualRanks, capture_calls
from benchmarks.exchange_timing import times_us
from benchmarks.gpu_state import gpu_state, require_gpu
from benchmarks.options import int_list
from benchmarks.report import save_result
from moe_engine.dist.exchange.domain import ExchangeShape

Calls = list[Callable[[], object]]


def main() -> None:
    """Check, time, print and save."""
    arguments = parse_arguments()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    require_gpu()
    world = VirtualRanks(arguments.ranks) if arguments.virtual else RealRanks.join()
    is_first = not isinstance(world, RealRanks) or world.number == 0
    results = []
    for num_rows in arguments.rows:
        shape = ExchangeShape(
            num_ranks=world.size,
            num_experts=world.size,
            top_k=1,
            hidden=arguments.hidden,
            dtype=torch.bfloat16,
            max_tokens=num_rows,
            reduced_rows=num_rows,
        )
        ranks = world.make(shape, "uniform")
        check(world, ranks)
        result = {"rows": num_rows} | measure(world, ranks)
        if isinstance(world, RealRanks):
            result |= measure_others(world, ranks[0])
        results.append(result)
        if is_first:
            print(
                ", ".join(f"{name} {_shown(value)}" for name, value in result.items()), flush=True
            )
    if arguments.json and is_first:
        output = {
            "gpu": gpu_state(),
            "torch": torch.__version__,
            "hidden": arguments.hidden,
            "ranks": world.size,
            "virtual": arguments.virtual,
        }
        save_result(arguments.json, output | {"results": results})
    if isinstance(world, RealRanks):
        world.leave()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--virtual", action="store_true", help="all ranks on one GPU")
    parser.add_argument("--ranks", type=int, default=2, help="virtual ones")
    parser.add_argument("--rows", type=int_list, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def check(world: Ranks, ranks: list[Rank]) -> None:
    """Raises `SystemExit` unless a sum has the right bits (a collective)."""
    outputs = []
    for rank in ranks:
        with torch.cuda.stream(rank.stream):
            outputs.append(rank.domain.all_reduce(rank.inputs[0].x_TH, range(world.size)))
    torch.cuda.synchronize()
    for rank in ranks:
        rank.domain.check()
    parts = world.all_tensors([rank.inputs[0].x_TH for rank in ranks])
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    for rank, out_TH in zip(ranks, outputs, strict=True):
        if not torch.equal(out_TH, total.to(out_TH.dtype)):
            raise SystemExit(f"rank {rank.number} has other bits than the sum in float32")


def measure(world: Ranks, ranks: list[Rank]) -> dict[str, Any]:
    """Ours, in microseconds (a collective)."""
    runs = []
    for rank in ranks:
        calls: Calls = [
            partial(rank.domain.all_reduce, tokens.x_TH, range(world.size))
            for tokens in _rotated(rank)
        ]
        runs.append(capture_calls(rank.stream, calls).replay)
    return _times("packets", times_us(world, ranks, runs))


def measure_others(world: RealRanks, rank: Rank) -> dict[str, Any]:
    """NCCL's and PyTorch's one-shot all-reduce, in place, in graphs (a collective)."""
    import torch.distributed._symmetric_memory as symmetric_memory

    x_TH = rank.inputs[0].x_TH
    shared_TH = symmetric_memory.empty(*x_TH.shape, dtype=x_TH.dtype, device=world.device)
    symmetric_memory.rendezvous(shared_TH, world.group)
    one_shot = torch.ops.symm_mem.one_shot_all_reduce
    name = world.group.group_name
    others: dict[str, Callable[[], object]] = {
        "nccl": partial(dist.all_reduce, x_TH.clone(), group=world.group),
        "torch_one_shot": partial(one_shot, shared_TH, "sum", name),
    }
    result: dict[str, Any] = {}
    for label, call in others.items():
        with torch.cuda.stream(rank.stream):
            call()
        torch.cuda.synchronize()
        world.meet()
        graph = capture_calls(rank.stream, [call] * EXCHANGES)
        result |= _times(label, times_us(world, [rank], [graph.replay]))
    return result


def _rotated(rank: Rank) -> list[Any]:
    return [rank.inputs[number % len(rank.inputs)] for number in range(EXCHANGES)]


def _times(label: str, times: list[float]) -> dict[str, float]:
    return {
        f"{label}_us": statistics.median(times),
        f"{label}_p99_us": statistics.quantiles(times, n=100)[98],
    }


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"


if __name__ == "__main__":
    main()
