"""Whole decode steps with each way of attending, for `moe_engine.ops.decode_attention.LAUNCHES`.

    python -m benchmarks.tune_decode --config configs/qwen3-30b-a3b-1gpu.yaml \\
        --batches 1,2,4,8 --inputs 512,2048,8192 --json FILE
    python -m benchmarks.tune_decode --config configs/qwen3-30b-a3b-1gpu.yaml \\
        --batches 16,32,64,128,256 --inputs 512 --launches 6:1:1,6:2:32,12:1:1,12:2:32

Beside the launches, those that are committed are measured, and `kernels.paged_decode`.
Kernels that are timed alone rank otherwise: what matters is also which blocks of the projections
before and after attention have room beside its own. So a rank is started for every candidate, and
two steps are under way at a time, as in the engine. Tokens are drawn at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.decode_bench import DecodeBench, add_arguments
from benchmarks.options import int_list, launch_list, plain_options
from moe_engine.ops import decode_attention
from moe_engine.ops.decode_attention import Launch

# By default: clusters, then blocks of either size, with a context in one to eight shares.
CANDIDATES = "0:1:2048,0:4:2048,0:8:2048," + ",".join(
    f"{block_warps}:{max_shares}:32" for block_warps in (6, 12) for max_shares in (1, 2, 4, 8)
)
WARM_UP_STEPS, MEASURED_STEPS = 10, 60

Table = tuple[tuple[int, Launch], ...]


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser, batches=[1, 2, 4, 8])
    parser.add_argument(
        "--inputs", type=int_list, default=[512, 2048, 8192], help="tokens of a prompt"
    )
    parser.add_argument(
        "--launches",
        type=launch_list,
        default=CANDIDATES,
        help="warps of a block (0: clusters):most shares:least tokens of a share, ...",
    )
    arguments = parser.parse_args()
    tables: dict[str, Table | None] = {"committed": None, "paged_decode": ()}
    for launch in arguments.launches:
        tables[":".join(map(str, astuple(launch)))] = ((2**31, launch),)
    cases = [(batch, length) for batch in arguments.batches for length in arguments.inputs]
    rows: list[dict[str, Any]] = [
        {"batch": batch, "input": length, "step_ms": {}} for batch, length in cases
    ]
    spawn = multiprocessing.get_context("spawn")
    # A process for each, because a rank keeps its memory to the end.
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for name, table in tables.items():
            times = pool.submit(measure, arguments, cases, table).result()
            for row, seconds in zip(rows, times, strict=True):
                row["step_ms"][name] = seconds * 1e3
            steps = (f"{row['batch']} x {row['input']}: {row['step_ms'][name]:.3f}" for row in rows)
            print(f"{name}: ms {', '.join(steps)}", flush=True)
    if arguments.json:
        output = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "steps": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(output) + "\n")
        print(f"written to {arguments.json}")


def measure(
    arguments: argparse.Namespace, cases: list[tuple[int, int]], table: Table | None
) -> list[float]:
    """Median seconds of a decode step of each (batch, input) with one table of launches."""
    if table is not None:
        decode_attention.LAUNCHES = table
    bench = DecodeBench(
        plain_options(arguments.config, arguments.set),
        arguments.model,
        max(arguments.batches),
        max(arguments.inputs),
        WARM_UP_STEPS + MEASURED_STEPS + 8,
        pipeline_depth=2,
    )
    medians = []
    for batch, num_input in cases:
        step = bench.prepare(batch, num_input, temperature=1.0)
        for _ in range(WARM_UP_STEPS):
            step()
        medians.append(statistics.median(bench.step_seconds(step, MEASURED_STEPS)))
    return medians


if __name__ == "__main__":
    main()
