"""Measures up to how many tokens packets are faster than rows, and writes the table that ships.

    python -m benchmarks.tune_exchange --virtual --ranks 2,4,8 --hidden 2048,4096 \\
        --write moe_engine/ops/tuned/h200.json
    torchrun --nproc-per-node 2 -m benchmarks.tune_exchange --hidden 2048,4096 --write FILE

For each number of ranks and each kind of row, more and more tokens are exchanged by both, in
graphs and with bits compared first, as `benchmarks.bench_exchange` does, until rows are faster. The
entries of these shapes are renewed in a file, whose others stay as they are.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_exchange import check
from benchmarks.exchange_cases import DTYPES
from benchmarks.exchange_ranks import Ranks, RealRanks, VirtualRanks, capture, exchange
from benchmarks.exchange_timing import median_us
from benchmarks.gpu_state import gpu_state, require_gpu
from benchmarks.options import int_list
from benchmarks.report import today
from benchmarks.tune import read_or_begin, to_text
from moe_engine.dist.exchange.domain import ExchangeShape
from moe_engine.ops import tuning
from moe_engine.ops.tuning import INF, ExchangeChoices

TOKENS = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512]
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
                steps = measure(world, shape)
                derived = derive(steps)
                print(f"{shape}: {derived}", flush=True)
                renew(document, shape, ranks_per_gpu, steps, derived)
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


def measure(world: Ranks, shape: ExchangeShape) -> list[dict[str, float]]:
    """Microseconds of an exchange of more and more tokens, until rows are faster (a collective)."""
    steps = []
    for tokens in TOKENS:
        step: dict[str, float] = {"tokens": tokens}
        for kind, packet_tokens in (("packets", tokens), ("rows", 0)):
            sized = replace(shape, max_tokens=tokens, packet_tokens=packet_tokens)
            ranks = world.make(sized, "uniform")
            check(world, ranks, sized)
            runs = [capture(rank, tokens, exchange).replay for rank in ranks]
            step[kind] = round(median_us(world, ranks, runs), 2)
        steps.append(step)
        if step["rows"] < step["packets"]:
            break
    return steps


def derive(steps: list[dict[str, float]]) -> ExchangeChoices:
    """Packets up to the most tokens with which they were faster.

    Example: of ``[{"tokens": 64, "packets": 9, "rows": 12}, {"tokens": 96, "packets": 13, "rows":
    12}]`` packets up to 64.
    """
    faster = [int(step["tokens"]) for step in steps if step["packets"] <= step["rows"]]
    packets = ((max(faster), "packets"),) if faster else ()
    return ExchangeChoices((*packets, (INF, "rows")))


def renew(
    document: dict[str, Any],
    shape: ExchangeShape,
    ranks_per_gpu: int,
    steps: list[dict[str, float]],
    derived: ExchangeChoices,
) -> None:
    """Put an entry into a file's document."""
    entry = {
        "shape": dict(zip(ExchangeChoices.SHAPE, shape.tuning_sizes(ranks_per_gpu), strict=True)),
        "choices": tuning.to_json(derived),
        "measured": {"run": run_name(ranks_per_gpu > 1), "steps": steps},
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
