"""Whole decode steps with each way of attending, for the limits in `moe_engine.ops.warp_decode`.

    python -m benchmarks.tune_decode --config configs/qwen3-30b-a3b-1gpu.yaml \\
        --batches 1,2,4,8 --inputs 512,2048,8192 --json FILE

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
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.decode_bench import DecodeBench, add_arguments
from benchmarks.options import int_list, plain_options
from moe_engine.ops import warp_decode

# Most shares of `ops.warp_decode`; None: `kernels.paged_decode` instead.
CANDIDATES = (None, 1, 4, 8)
WARM_UP_STEPS, MEASURED_STEPS = 10, 60


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser, batches=[1, 2, 4, 8])
    parser.add_argument(
        "--inputs", type=int_list, default=[512, 2048, 8192], help="tokens of a prompt"
    )
    arguments = parser.parse_args()
    cases = [(batch, length) for batch in arguments.batches for length in arguments.inputs]
    rows: list[dict[str, Any]] = [
        {"batch": batch, "input": length, "step_ms": {}} for batch, length in cases
    ]
    spawn = multiprocessing.get_context("spawn")
    # A process for each, because a rank keeps its memory to the end.
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for candidate in CANDIDATES:
            name = f"{candidate} shares" if candidate else "paged_decode"
            times = pool.submit(measure, arguments, cases, candidate).result()
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
    arguments: argparse.Namespace, cases: list[tuple[int, int]], candidate: int | None
) -> list[float]:
    """Median seconds of a decode step of each (batch, input) with one candidate."""
    warp_decode.MAX_PAIRS = 2**31 if candidate else 0
    warp_decode.MAX_SHARES = candidate or 1
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
