"""Measures how ranks best exchange so many tokens, and writes the table that ships.

    python -m benchmarks.tune_exchange --virtual --ranks 2,4,8 --hidden 2048,4096 \\
        --write moe_engine/ops/tuned/h200.json
    torchrun --nproc-per-node 2 -m benchmarks.tune_exchange --hidden 2048,4096 --write FILE

For each number of ranks and each kind of row, more and more tokens are exchanged by packets and by
rows, in graphs and with bits compared first, as `benchmarks.bench_exchange` does, until rows are
faster. Then, for ranks that share each sequence's attention, a step's tokens are summed by
all-reduce, which is all that travels where each rank has all tokens, or shared out, exchanged and
gathered, until the latter is faster; and combine by packets is followed by a norm in a launch of
its own, or in the same. The entries of these shapes are renewed in a file, whose others stay as
they are.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_exchange import check
from benchmarks.exchange_cases import DTYPES
from benchmarks.exchange_ranks import (
    Rank,
    Ranks,
    RealRanks,
    VirtualRanks,
    capture,
    exchange,
    exchange_norm,
    exchange_then_norm,
)
from benchmarks.exchange_timing import median_us
from benchmarks.gpu_state import gpu_state, require_gpu
from benchmarks.options import int_list
from benchmarks.report import today
from benchmarks.tune import read_or_begin, to_text
from moe_engine.dist.exchange.domain import ExchangeShape
from moe_engine.dist.exchange.nvlink import NvlinkExchange
from moe_engine.ops import tuning
from moe_engine.ops.reference.exchange import Tokens
from moe_engine.ops.tuning import INF, ExchangeChoices

Times = Callable[[Ranks, ExchangeShape, int], tuple[float, float]]
TOKENS = [4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512]
NUM_EXPERTS, TOP_K = 128, 8


def main() -> None:
    """Measure, derive, print and write."""
    arguments = parse_arguments()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    require_gpu()
    document = read_or_begin(arguments.write, torch.cuda.get_device_name())
    worlds: list[VirtualRanks | RealRanks] = (
        [VirtualRanks(size) for size in arguments.ranks]
        if arguments.virtual
        else [RealRanks.join()]
    )
    for world in worlds:
        ranks_per_gpu = world.size if arguments.virtual else 1
        for hidden in arguments.hidden:
            for dtype in ("bf16", "fp8"):
                shape = ExchangeShape(
                    num_ranks=world.size,
                    num_experts=NUM_EXPERTS,
                    top_k=TOP_K,
                    hidden=hidden,
                    dtype=DTYPES[dtype],
                    max_tokens=1,
                    fp8=dtype == "fp8",
                )
                packets = compare(world, shape, "packets", "rows", kinds_us)
                shape = replace(shape, packet_tokens=best_up_to(packets, "packets", "rows"))
                shared = compare(world, shape, "replicated", "sharded", tensor_parallel_us)
                norms = compare(world, shape, "apart", "fused", norms_us)
                renew(document, shape, ranks_per_gpu, packets, shared, norms)
                print(f"{shape}: {document['exchange'][-1]['choices']}", flush=True)
    last = worlds[-1]
    if arguments.write and (isinstance(last, VirtualRanks) or last.number == 0):
        document["runs"] = document.get("runs", {}) | {run_name(arguments.virtual): run()}
        tuning.parse_document(document, arguments.write)
        arguments.write.write_text(to_text(document) + "\n")
        print(f"written to {arguments.write}")
    if isinstance(last, RealRanks):
        last.leave()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--virtual", action="store_true", help="all ranks on one GPU")
    parser.add_argument("--ranks", type=int_list, default=[2, 4, 8], help="virtual ones")
    parser.add_argument("--hidden", type=int_list, default=[2048, 4096])
    parser.add_argument("--write", type=Path, help="a file of moe_engine/ops/tuned/")
    return parser.parse_args(argv)


def compare(
    world: Ranks, shape: ExchangeShape, few: str, many: str, times_of: Times
) -> list[dict[str, float]]:
    """Microseconds of both for more and more tokens, until ``many`` is faster (a collective)."""
    steps = []
    for tokens in TOKENS:
        few_us, many_us = times_of(world, shape, tokens)
        steps.append({"tokens": tokens, few: round(few_us, 2), many: round(many_us, 2)})
        if many_us < few_us:
            break
    return steps


def kinds_us(world: Ranks, shape: ExchangeShape, tokens: int) -> tuple[float, float]:
    """An exchange of so many tokens of each rank, by packets and by rows."""
    by_packets = replace(shape, max_tokens=tokens, packet_tokens=tokens)
    return exchange_us(world, by_packets), exchange_us(world, replace(by_packets, packet_tokens=0))


def exchange_us(world: Ranks, shape: ExchangeShape) -> float:
    """An exchange of as many tokens as the ranks may bring, after its bits were compared."""
    ranks = world.make(shape, "uniform")
    check(world, ranks, shape)
    return median_us(world, ranks, [capture(r, shape.max_tokens, exchange).replay for r in ranks])


def tensor_parallel_us(world: Ranks, shape: ExchangeShape, tokens: int) -> tuple[float, float]:
    """An all-reduce of a step's tokens, and an exchange of a share of each rank and a gather."""
    share = -(-tokens // world.size)
    ranks = world.make(replace(shape, max_tokens=share, reduced_rows=tokens), "uniform")
    group = range(world.size)

    def sum_all(rank: Rank, _: NvlinkExchange, __: Tokens) -> object:
        return rank.domain.all_reduce(rank.y_PH[:tokens], group)

    def exchange_and_gather(rank: Rank, step: NvlinkExchange, of_rank: Tokens) -> object:
        out_TH = exchange(rank, step, of_rank)
        all_TH = out_TH.new_empty(share * world.size, out_TH.shape[1])
        return rank.domain.all_gather(out_TH, all_TH, [out_TH.nbytes] * world.size, group)

    both = [
        median_us(world, ranks, [capture(rank, share, run).replay for rank in ranks])
        for run in (sum_all, exchange_and_gather)
    ]
    return both[0], both[1]


def norms_us(world: Ranks, shape: ExchangeShape, tokens: int) -> tuple[float, float]:
    """An exchange by packets and the norm that follows, in a launch of its own and in the same."""
    ranks = world.make(replace(shape, max_tokens=tokens, packet_tokens=tokens), "uniform")
    both = [
        median_us(world, ranks, [capture(rank, tokens, run).replay for rank in ranks])
        for run in (exchange_then_norm, exchange_norm)
    ]
    return both[0], both[1]


def best_up_to(steps: list[dict[str, float]], few: str, many: str) -> int:
    """The most tokens with which ``few`` was not slower; 0: it always was.

    Example: of ``[{"tokens": 64, "packets": 9, "rows": 12}, {"tokens": 96, "packets": 13, "rows":
    12}]`` 64.
    """
    return max((int(step["tokens"]) for step in steps if step[few] <= step[many]), default=0)


def derive(
    packets: list[dict[str, float]],
    shared: list[dict[str, float]],
    norms: list[dict[str, float]],
) -> ExchangeChoices:
    """The choices that follow from what `compare` has found."""

    def limits(steps: list[dict[str, float]], few: str, many: str) -> tuning.Steps[str]:
        limit = best_up_to(steps, few, many)
        return (*([(limit, few)] if limit else []), (INF, many))

    return ExchangeChoices(
        limits(packets, "packets", "rows"),
        limits(shared, "replicated", "sharded"),
        limits(norms, "apart", "fused"),
    )


def renew(
    document: dict[str, Any],
    shape: ExchangeShape,
    ranks_per_gpu: int,
    packets: list[dict[str, float]],
    shared: list[dict[str, float]],
    norms: list[dict[str, float]],
) -> None:
    """Put an entry into a file's document."""
    entry = {
        "shape": dict(zip(ExchangeChoices.SHAPE, shape.tuning_sizes(ranks_per_gpu), strict=True)),
        "choices": tuning.to_json(derive(packets, shared, norms)),
        "measured": {
            "run": run_name(ranks_per_gpu > 1),
            "kinds": packets,
            "tensor_parallel": shared,
            "norms": norms,
        },
    }
    others = [e for e in document.get("exchange", []) if e["shape"] != entry["shape"]]
    document["exchange"] = [*others, entry]


def run_name(is_virtual: bool) -> str:
    """Of the file's runs."""
    return "exchange of virtual ranks" if is_virtual else "exchange"


def run() -> dict[str, Any]:
    """What measured the entries."""
    return {
        "date": today(),
        "command": shlex.join(["python", "-m", "benchmarks.tune_exchange", *sys.argv[1:]]),
        "torch": torch.__version__,
        "driver": gpu_state()["driver_version"],
    }


if __name__ == "__main__":
    main()
